"""Attention in linear time, as quadratic formulas: all weights are computed, one by one, from their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
FeatureMap = Callable[[Array], Array]

FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
}


def _heads(query: ArrayLike, key: ArrayLike, value: ArrayLike) -> tuple[Array, Array, Array]:
    """Return float64 arrays with a key–value head for each query head."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    return q, np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)


def _allowed(q: Array, k: Array, attn_mask: ArrayLike | None, is_causal: bool) -> NDArray[np.bool_]:
    """Return which keys each query may see, (B, H, L, S)."""
    L, S = q.shape[2], k.shape[2]
    allowed = np.ones((*q.shape[:2], L, S), dtype=bool)
    if attn_mask is not None:
        allowed &= np.asarray(attn_mask)
    if is_causal:
        allowed &= np.arange(S) <= np.arange(L)[:, None] + (S - L)
    return allowed


def _ratio(weights: Array, v: Array) -> Array:
    """Return Σⱼ wᵢⱼ vⱼ / Σⱼ wᵢⱼ, and 0 where the weights sum to 0."""
    output = np.zeros((*weights.shape[:3], v.shape[3]))
    for b, h, i in np.ndindex(weights.shape[:3]):
        total = weights[b, h, i].sum()
        if total != 0:
            output[b, h, i] = weights[b, h, i] @ v[b, h] / total
    return output


def _softmax(scores: Array, allowed: NDArray[np.bool_]) -> Array:
    """Return softmax over the allowed part of each row of the last axis; 0 elsewhere, and in empty rows."""
    weights = np.zeros(scores.shape)
    for index in np.ndindex(scores.shape[:-1]):
        seen = allowed[index]
        if seen.any():
            e = np.exp(scores[index][seen] - scores[index][seen].max())
            weights[index][seen] = e / e.sum()
    return weights


def linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    feature_map: str | FeatureMap = "elu1",
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    """Weigh values by φ(q)·φ(k), divided by the row's sum.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        feature_map: φ, a name in ``FEATURE_MAPS`` or a function of arrays.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let query i see keys up to i + S − L.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _heads(query, key, value)
    phi = feature_map if callable(feature_map) else FEATURE_MAPS[feature_map]
    weights = np.einsum("bhlf,bhsf->bhls", phi(q), phi(k))
    return _ratio(weights * _allowed(q, k, attn_mask, is_causal), v)


def performer_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    projection: ArrayLike,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Weigh values by the mean over w of exp(w·q − q·q/2) exp(w·k − k·k/2), divided by the row's sum.

    Args:
        query: (B, H, L, D); multiplied by √scale first, as key is.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        projection: the vectors w, (m, D) or (H, m, D).
        attn_mask: as for :func:`linear_attention`.
        is_causal: as for :func:`linear_attention`.
        scale: 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _heads(query, key, value)
    factor = np.sqrt(1 / np.sqrt(q.shape[3]) if scale is None else scale)
    q, k = factor * q, factor * k
    weights = np.zeros((*q.shape[:3], k.shape[2]))
    for h in range(q.shape[1]):
        w = np.asarray(projection, dtype=np.float64)
        w = w if w.ndim == 2 else w[h % len(w)]
        phi_q = np.exp(q[:, h] @ w.T - (q[:, h] ** 2).sum(-1, keepdims=True) / 2)
        phi_k = np.exp(k[:, h] @ w.T - (k[:, h] ** 2).sum(-1, keepdims=True) / 2)
        weights[:, h] = np.einsum("blm,bsm->bls", phi_q, phi_k) / len(w)
    return _ratio(weights * _allowed(q, k, attn_mask, is_causal), v)


def random_feature_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    projection: ArrayLike,
    bandwidth: float = 1.0,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    """Weigh values by the mean over w of cos(w·(q − k)/σ) for unit vectors q and k, divided by the row's sum.

    Args:
        query: (B, H, L, D); divided by its length first, as key is.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        projection: the vectors w, (m, D) or (H, m, D).
        bandwidth: σ.
        attn_mask: as for :func:`linear_attention`.
        is_causal: as for :func:`linear_attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _heads(query, key, value)
    q, k = q / np.linalg.norm(q, axis=-1, keepdims=True), k / np.linalg.norm(k, axis=-1, keepdims=True)
    weights = np.zeros((*q.shape[:3], k.shape[2]))
    for b, h, i in np.ndindex(q.shape[:3]):
        w = np.asarray(projection, dtype=np.float64)
        w = w if w.ndim == 2 else w[h % len(w)]
        weights[b, h, i] = np.cos((q[b, h, i] - k[b, h]) @ w.T / bandwidth).mean(-1)
    return _ratio(weights * _allowed(q, k, attn_mask, is_causal), v)


def cosformer_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    horizon: int | None = None,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    """Weigh values by relu(q)·relu(k) cos(π (i − j) / 2M), divided by the row's sum.

    Args:
        query: (B, H, L, D); query i stands at i + S − L.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        horizon: M; the larger of L and S by default.
        attn_mask: as for :func:`linear_attention`.
        is_causal: as for :func:`linear_attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _heads(query, key, value)
    L, S = q.shape[2], k.shape[2]
    M = max(L, S) if horizon is None else horizon
    distance = np.arange(L)[:, None] + (S - L) - np.arange(S)
    weights = np.einsum("bhld,bhsd->bhls", np.maximum(q, 0), np.maximum(k, 0)) * np.cos(np.pi * distance / (2 * M))
    return _ratio(weights * _allowed(q, k, attn_mask, is_causal), v)


def linformer_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    projection_key: ArrayLike,
    projection_value: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Compute softmax(Q (E K)ᵀ · scale) (F V); masked keys and values count as zero vectors.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        projection_key: E, (k, S) or (H, k, S).
        projection_value: F, likewise; E by default.
        attn_mask: of keys, broadcastable to (B, H, 1, S).
        scale: 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _heads(query, key, value)
    E = np.asarray(projection_key, dtype=np.float64)
    F = E if projection_value is None else np.asarray(projection_value, dtype=np.float64)
    present = _allowed(q[:, :, :1], k, attn_mask, False)[:, :, 0, :, None]  # (B, H, S, 1)
    mixed_keys, mixed_values = E @ (k * present), F @ (v * present)
    scores = np.einsum("bhld,bhkd->bhlk", q, mixed_keys) * (1 / np.sqrt(q.shape[3]) if scale is None else scale)
    return _softmax(scores, np.ones(scores.shape, dtype=bool)) @ mixed_values


def nystrom_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    num_landmarks: int = 64,
    num_iterations: int = 6,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Compute softmax(Q K̄ᵀ) Z softmax(Q̄ Kᵀ) V with landmarks Q̄, K̄ and the iterated pseudo-inverse Z.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        num_landmarks: no more than L or S are used.
        num_iterations: steps towards the pseudo-inverse.
        attn_mask: of keys, broadcastable to (B, H, 1, S).
        scale: 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _heads(query, key, value)
    (B, H, L, D), S = q.shape, k.shape[2]
    m = min(num_landmarks, L, S)
    factor = 1 / np.sqrt(D) if scale is None else scale
    present = _allowed(q[:, :, :1], k, attn_mask, False)[:, :, 0]  # (B, H, S)
    output = np.zeros((B, H, L, v.shape[3]))
    for b, h in np.ndindex(B, H):
        here = np.flatnonzero(present[b, h])
        marks_q, _ = _landmarks(q[b, h], m)
        marks_k, used = _landmarks(k[b, h][here], m)
        left = _softmax(factor * q[b, h] @ marks_k.T, np.broadcast_to(used, (L, m)))
        middle = _softmax(factor * marks_q @ marks_k.T, np.broadcast_to(used, (m, m)))
        right = _softmax(factor * marks_q @ k[b, h].T, np.broadcast_to(present[b, h], (m, S)))
        output[b, h] = left @ _pseudo_inverse(middle, num_iterations) @ right @ v[b, h]
    return output


def _landmarks(x: Array, m: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return the means of m runs of the rows of x, and which runs have rows."""
    runs = [[r for r in range(len(x)) if r * m // len(x) == a] for a in range(m)]
    means = np.array([x[run].mean(0) if run else np.zeros(x.shape[1]) for run in runs])
    return means, np.array([bool(run) for run in runs])


def _pseudo_inverse(a: Array, steps: int) -> Array:
    """Return Z after some steps of Z ← Z (13 I − A Z (15 I − A Z (7 I − A Z))) / 4."""
    if not a.any():
        return a.T
    z, one = a.T / (np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf)), np.eye(len(a))
    for _ in range(steps):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def _layer_norm(x: Array, scale: ArrayLike | None, shift: ArrayLike | None, eps: float) -> Array:
    """Normalise the vectors of each head, (B, heads, n, D)."""
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    if scale is not None:
        x = x * np.asarray(scale, dtype=np.float64)[..., None, :]
    if shift is not None:
        x = x + np.asarray(shift, dtype=np.float64)[..., None, :]
    return x


def _mean_over_keys(q: Array, k: Array, v: Array, allowed: NDArray[np.bool_]) -> Array:
    """Return the mean of (q·k) v over the keys that each query may see; 0 where there are none."""
    output = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h, i in np.ndindex(q.shape[:3]):
        seen = allowed[b, h, i]
        if seen.any():
            output[b, h, i] = (k[b, h][seen] @ q[b, h, i]) @ v[b, h][seen] / seen.sum()
    return output


def galerkin_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    key_scale: ArrayLike | None = None,
    key_shift: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    value_shift: ArrayLike | None = None,
    eps: float = 1e-5,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    """Compute the mean of (q·k̃) ṽ over keys, with layer-normalised keys and values.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        key_scale: (D,) or (Hkv, D), after the normalisation.
        key_shift: likewise.
        value_scale: (Dv,) or (Hkv, Dv).
        value_shift: likewise.
        eps: added to the variances.
        attn_mask: as for :func:`linear_attention`.
        is_causal: as for :func:`linear_attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    key = _layer_norm(np.asarray(key, dtype=np.float64), key_scale, key_shift, eps)
    value = _layer_norm(np.asarray(value, dtype=np.float64), value_scale, value_shift, eps)
    q, k, v = _heads(query, key, value)
    return _mean_over_keys(q, k, v, _allowed(q, k, attn_mask, is_causal))


def fourier_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    query_scale: ArrayLike | None = None,
    query_shift: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    key_shift: ArrayLike | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> Array:
    """Compute the mean of (q̃·k̃) v over keys, with layer-normalised queries and keys.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        query_scale: (D,) or (H, D), after the normalisation.
        query_shift: likewise.
        key_scale: (D,) or (Hkv, D).
        key_shift: likewise.
        scale: factor of the products.
        eps: added to the variances.
        attn_mask: as for :func:`linear_attention`.
        is_causal: as for :func:`linear_attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    query = _layer_norm(np.asarray(query, dtype=np.float64), query_scale, query_shift, eps)
    key = _layer_norm(np.asarray(key, dtype=np.float64), key_scale, key_shift, eps)
    q, k, v = _heads(scale * query, key, value)
    return _mean_over_keys(q, k, v, _allowed(q, k, attn_mask, is_causal))
