"""Attention with a matrix-valued state in NumPy, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.shapes import mismatch

Array = NDArray[np.float64]


class _Sequences:
    """The sequences of a call, one for each item of the batch and each query head."""

    def __init__(self, query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None):
        self.q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
        B, H, L, D = self.q.shape
        if k.shape[2] != L:
            raise mismatch("key", f"as many positions as query has, S = L = {L}", f"shape {k.shape}")
        self.k, self.v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
        keys = np.ones((B, H, 1, L), dtype=bool) if attn_mask is None else np.asarray(attn_mask)
        self.used = np.broadcast_to(keys, (B, H, 1, L))[:, :, 0]
        self.output = np.zeros((B, H, L, v.shape[3]))
        self.state = np.zeros((B, H, D, v.shape[3]))

    def start(self, state: ArrayLike | None) -> None:
        """Start from an earlier call's state."""
        if state is not None:
            self.state = np.array(state, dtype=np.float64)

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """Yield item, head and position of each token, in order."""
        yield from np.ndindex(self.q.shape[:3])

    def result(self, return_state: bool) -> Array | tuple[Array, Array]:
        """Return the outputs, and on request the states."""
        return (self.output, self.state) if return_state else self.output


def delta_rule_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    beta: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    scale: float = 1.0,
    state: ArrayLike | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Compute S ← α S (I − β k kᵀ) + β v kᵀ and o = scale · S q, the papers' S being the transpose of the state.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        beta: broadcastable to (B, H, L).
        log_decay: broadcastable to (B, H, L), the logarithms of α; 0 by default.
        attn_mask: broadcastable to (B, H, 1, L), bool; positions that are False leave the state as it is.
        scale: factor of the scores.
        state: (B, H, D, Dv); zeros by default.
        return_state: return the last state too.
    Returns:
        (B, H, L, Dv) float64; with return_state also (B, H, D, Dv).
    """
    call = _Sequences(query, key, value, attn_mask)
    call.start(state)
    lengths = call.q.shape[:3]
    strength = np.broadcast_to(np.asarray(beta, dtype=np.float64), lengths)
    alpha = np.broadcast_to(np.exp(np.asarray(0.0 if log_decay is None else log_decay, dtype=np.float64)), lengths)
    identity = np.eye(call.q.shape[3])
    for b, h, t in call.tokens():
        S, q, k, v = call.state[b, h].T, call.q[b, h, t], call.k[b, h, t], call.v[b, h, t]
        if call.used[b, h, t]:
            S = alpha[b, h, t] * S @ (identity - strength[b, h, t] * np.outer(k, k)) + strength[b, h, t] * np.outer(
                v, k
            )
        call.state[b, h] = S.T
        call.output[b, h, t] = scale * S @ q
    return call.result(return_state)


def gated_linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    log_decay: ArrayLike,
    *,
    attn_mask: ArrayLike | None = None,
    scale: float = 1.0,
    state: ArrayLike | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Compute S ← Diag(exp log_decay) S + k vᵀ and o = scale · Sᵀ q.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        log_decay: broadcastable to (B, H, L, D).
        attn_mask: broadcastable to (B, H, 1, L), bool; positions that are False leave the state as it is.
        scale: factor of the scores.
        state: (B, H, D, Dv); zeros by default.
        return_state: return the last state too.
    Returns:
        (B, H, L, Dv) float64; with return_state also (B, H, D, Dv).
    """
    call = _Sequences(query, key, value, attn_mask)
    call.start(state)
    alpha = np.broadcast_to(np.exp(np.asarray(log_decay, dtype=np.float64)), call.q.shape)
    for b, h, t in call.tokens():
        if call.used[b, h, t]:
            call.state[b, h] = np.diag(alpha[b, h, t]) @ call.state[b, h] + np.outer(call.k[b, h, t], call.v[b, h, t])
        call.output[b, h, t] = scale * call.state[b, h].T @ call.q[b, h, t]
    return call.result(return_state)


def ssd_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    log_decay: ArrayLike,
    *,
    attn_mask: ArrayLike | None = None,
    scale: float = 1.0,
    state: ArrayLike | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Compute the state-space model h ← a h + B xᵀ, y = hᵀ C, with C the query, B the key, x the value, a a number.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        log_decay: broadcastable to (B, H, L), the logarithms of a.
        attn_mask: broadcastable to (B, H, 1, L), bool; positions that are False leave the state as it is.
        scale: factor of the scores.
        state: (B, H, D, Dv); zeros by default.
        return_state: return the last state too.
    Returns:
        (B, H, L, Dv) float64; with return_state also (B, H, D, Dv).
    """
    call = _Sequences(query, key, value, attn_mask)
    call.start(state)
    a = np.broadcast_to(np.exp(np.asarray(log_decay, dtype=np.float64)), call.q.shape[:3])
    for b, h, t in call.tokens():
        if call.used[b, h, t]:
            call.state[b, h] = a[b, h, t] * call.state[b, h] + np.outer(call.k[b, h, t], call.v[b, h, t])
        call.output[b, h, t] = scale * call.state[b, h].T @ call.q[b, h, t]
    return call.result(return_state)


def retention_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
    state: ArrayLike | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Compute S ← γ S + k vᵀ and o = scale · Sᵀ q.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        gamma: (H,); 1 − 2^(−5−h) for head h by default.
        attn_mask: broadcastable to (B, H, 1, L), bool; positions that are False leave the state as it is.
        scale: factor of the scores; 1/√D by default.
        state: (B, H, D, Dv); zeros by default.
        return_state: return the last state too.
    Returns:
        (B, H, L, Dv) float64; with return_state also (B, H, D, Dv).
    """
    call = _Sequences(query, key, value, attn_mask)
    call.start(state)
    H, D = call.q.shape[1], call.q.shape[3]
    decay = 1 - 2.0 ** (-5 - np.arange(H)) if gamma is None else np.asarray(gamma, dtype=np.float64)
    factor = 1 / np.sqrt(D) if scale is None else scale
    for b, h, t in call.tokens():
        if call.used[b, h, t]:
            call.state[b, h] = decay[h] * call.state[b, h] + np.outer(call.k[b, h, t], call.v[b, h, t])
        call.output[b, h, t] = factor * call.state[b, h].T @ call.q[b, h, t]
    return call.result(return_state)
