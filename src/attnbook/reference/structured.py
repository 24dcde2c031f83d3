"""Attention with other queries, keys or scores in NumPy, query by query or pair by pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.reference.dense import Array, attention, softmax


def _float(*arrays: ArrayLike) -> list[Array]:
    return [np.asarray(x, dtype=np.float64) for x in arrays]


def _per_head(table: ArrayLike, heads: int) -> Array:
    """Give each head its table: (R, D) or (H, R, D) → (H, R, D)."""
    array = np.asarray(table, dtype=np.float64)
    return np.broadcast_to(array, (heads, *array.shape[-2:]))


def _behind(i: int, L: int, S: int) -> NDArray[np.int64]:
    """Return how far each of S keys stands behind query i of L, ends aligned."""
    return i + S - L - np.arange(S)


def hopfield_energy(state: ArrayLike, patterns: ArrayLike, *, beta: float) -> Array:
    """Compute −(1/β) log Σₘ exp(β xₘ·ξ) + ½ ξ·ξ + (1/β) log M + ½ maxₘ xₘ·xₘ ({cite}`ramsauer2021`, eq. 2).

    Args:
        state: (…, D).
        patterns: (M, D).
        beta: β.
    Returns:
        (…) float64.
    """
    xi, x = _float(state, patterns)
    energy = np.empty(xi.shape[:-1])
    for index in np.ndindex(energy.shape):
        overlaps = [beta * float(row @ xi[index]) for row in x]
        top = max(overlaps)
        log_sum = top + np.log(sum(np.exp(z - top) for z in overlaps))
        radius = max(float(row @ row) for row in x)
        energy[index] = -log_sum / beta + xi[index] @ xi[index] / 2 + np.log(len(x)) / beta + radius / 2
    return energy


def hopfield_retrieve(state: ArrayLike, patterns: ArrayLike, *, beta: float, steps: int = 1) -> Array:
    """Repeat ξ ← Σₘ pₘ xₘ with p = softmax(β xₘ·ξ), state by state ({cite}`ramsauer2021`, eq. 3).

    Args:
        state: (…, D).
        patterns: (M, D).
        beta: β.
        steps: how many updates.
    Returns:
        (…, D) float64.
    """
    xi, x = _float(state, patterns)
    xi = xi.copy()
    for index in np.ndindex(xi.shape[:-1]):
        for _ in range(steps):
            weights = softmax(np.array([beta * (row @ xi[index]) for row in x]))
            xi[index] = sum(p * row for p, row in zip(weights, x, strict=True))
    return xi


def latent_attention(
    query: ArrayLike,
    latent: ArrayLike,
    key_up: ArrayLike,
    value_up: ArrayLike,
    *,
    query_rope: ArrayLike | None = None,
    key_rope: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Make keys and values from latents, head by head, and attend ({cite}`deepseek2024`, §2.1.2 and §2.1.3).

    Args:
        query: (B, H, L, D).
        latent: (B, S, C).
        key_up: (H, D, C).
        value_up: (H, Dv, C).
        query_rope: (B, H, L, R), or None.
        key_rope: (B, S, R), or None.
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: 1/√(D + R) by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, c, wk, wv = _float(query, latent, key_up, value_up)
    (B, H, _, _), S = q.shape, c.shape[1]
    keys, values = np.empty((B, H, S, wk.shape[1])), np.empty((B, H, S, wv.shape[1]))
    for b, h, j in np.ndindex(B, H, S):
        keys[b, h, j] = wk[h] @ c[b, j]
        values[b, h, j] = wv[h] @ c[b, j]
    if query_rope is not None:
        q = np.concatenate([q, np.asarray(query_rope, dtype=np.float64)], -1)
        turned = np.asarray(key_rope, dtype=np.float64)[:, None]
        keys = np.concatenate([keys, np.broadcast_to(turned, (B, H, *turned.shape[2:]))], -1)
    return attention(q, keys, values, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def perceiver_attention(
    latents: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend from latents, the same for every sequence, to an input.

    Args:
        latents: (H, M, D) or (B, H, M, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, M, Dv) float64.
    """
    array = np.asarray(latents, dtype=np.float64)
    queries = np.broadcast_to(array, (np.shape(key)[0], *array.shape[-3:]))
    return attention(queries, key, value, attn_mask=attn_mask, scale=scale)


def induced_set_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    inducing: ArrayLike,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Pool keys and values by attention from inducing points; attend to what was pooled.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        inducing: (H, M, D).
        attn_mask: broadcastable to (B, H, 1, S), bool.
        scale: as for :func:`attention`, of both.
    Returns:
        (B, H, L, Dv) float64.
    """
    points = np.broadcast_to(inducing, (np.shape(key)[0], *np.shape(inducing)))
    keys, values = (attention(points, key, x, attn_mask=attn_mask, scale=scale) for x in (key, value))
    return attention(query, keys, values, scale=scale)


def shaw_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    key_table: ArrayLike,
    value_table: ArrayLike | None = None,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Attend to kⱼ + aᵢⱼ and mix vⱼ + bᵢⱼ, query by query ({cite}`shaw2018`, eqs. 3 and 4).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        key_table: (2k + 1, D) or (H, 2k + 1, D).
        value_table: (2k + 1, Dv) or (H, 2k + 1, Dv), or None.
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v = _float(query, key, value)
    (B, H, L, D), S = q.shape, k.shape[2]
    factor = 1 / np.sqrt(D) if scale is None else scale

    def vectors(table: Array, i: int) -> Array:
        reach = table.shape[1] // 2
        return table[:, np.clip(-_behind(i, L, S), -reach, reach) + reach]  # (H, S, …)

    a, bias = _per_head(key_table, H), np.empty((B, H, L, S))
    for i in range(L):
        bias[:, :, i] = np.einsum("bhd,hsd->bhs", q[:, :, i], vectors(a, i)) * factor
    output, weights = attention(
        q, k, v, attn_mask=attn_mask, bias=bias, is_causal=is_causal, scale=scale, return_weights=True
    )
    if value_table is not None:
        b = _per_head(value_table, H)
        for i in range(L):
            output[:, :, i] += np.einsum("bhs,hsd->bhd", weights[:, :, i], vectors(b, i))
    return output


def transformer_xl_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    position_key: ArrayLike,
    content_bias: ArrayLike,
    position_bias: ArrayLike,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Attend with scores (qᵢ + u)·kⱼ + (qᵢ + v)·r₍ᵢ₋ⱼ₎, query by query ({cite}`dai2019`, §3.3).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        position_key: (R, D) or (H, R, D): row m is r of the distance S − 1 − m.
        content_bias: (H, D), u.
        position_bias: (H, D), v.
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, u, w = _float(query, key, content_bias, position_bias)
    (B, H, L, D), S = q.shape, k.shape[2]
    r, factor = _per_head(position_key, H), 1 / np.sqrt(D) if scale is None else scale
    bias = np.zeros((B, H, L, S))
    for i in range(L):
        behind = _behind(i, L, S)
        if is_causal:
            behind = np.maximum(behind, 0)  # keys ahead are masked, and may have no row
        bias[:, :, i] = np.einsum("bhd,hsd->bhs", q[:, :, i] + w, r[:, S - 1 - behind]) * factor
    return attention(q + u[:, None], k, value, attn_mask=attn_mask, bias=bias, is_causal=is_causal, scale=scale)


def music_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    table: ArrayLike,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend causally with scores qᵢ·(kⱼ + e₍ᵢ₋ⱼ₎), query by query ({cite}`huang2019`).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        table: (R, D) or (H, R, D): row m is e of the distance R − 1 − m.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k = _float(query, key)
    (B, H, L, D), S = q.shape, k.shape[2]
    e, factor = _per_head(table, H), 1 / np.sqrt(D) if scale is None else scale
    bias, R = np.zeros((B, H, L, S)), e.shape[1]
    for i in range(L):
        distances = np.clip(_behind(i, L, S), 0, R - 1)
        bias[:, :, i] = np.einsum("bhd,hsd->bhs", q[:, :, i], e[:, R - 1 - distances]) * factor
    return attention(q, k, value, attn_mask=attn_mask, bias=bias, is_causal=True, scale=scale)


def disentangled_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    position_key: ArrayLike,
    position_query: ArrayLike,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Attend with scores qᵢ·kⱼ + qᵢ·r_δ(i,j) + kⱼ·s_δ(j,i), query by query ({cite}`he2021`, eqs. 3 and 4).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        position_key: (2k, D) or (H, 2k, D), r.
        position_query: (2k, D) or (H, 2k, D), s.
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: 1/√(3D) by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k = _float(query, key)
    (B, H, L, D), S = q.shape, k.shape[2]
    scale = 1 / np.sqrt(3 * D) if scale is None else scale
    r, s = _per_head(position_key, H), _per_head(position_query, H)
    keys = np.repeat(k, H // k.shape[1], axis=1)

    def delta(distance: int, rows: int) -> int:
        half = rows // 2
        return 0 if distance <= -half else rows - 1 if distance >= half else distance + half

    bias = np.empty((B, H, L, S))
    for i in range(L):
        here = r[:, [delta(d, r.shape[1]) for d in _behind(i, L, S)]]  # (H, S, D)
        there = s[:, [delta(-d, s.shape[1]) for d in _behind(i, L, S)]]
        to_position = np.einsum("bhd,hsd->bhs", q[:, :, i], here)
        to_content = np.einsum("bhsd,hsd->bhs", keys, there)
        bias[:, :, i] = (to_position + to_content) * scale
    return attention(q, k, value, attn_mask=attn_mask, bias=bias, is_causal=is_causal, scale=scale)


def t5_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    table: ArrayLike,
    max_distance: int = 128,
    bidirectional: bool | None = None,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
) -> Array:
    """Attend with a bias for each head and bucket of distances ({cite}`raffel2020`, §2.1).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        table: (R, H).
        max_distance: distances from it on share the last bucket.
        bidirectional: by default where not causal.
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: 1 by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    numbers = np.asarray(table, dtype=np.float64)
    L, S = np.shape(query)[2], np.shape(key)[2]
    both = not is_causal if bidirectional is None else bidirectional
    count = len(numbers) // 2 if both else len(numbers)
    exact = count // 2
    bias = np.empty((numbers.shape[1], L, S))
    for i, j in np.ndindex(L, S):
        behind = i + S - L - j
        distance = abs(behind) if both else max(behind, 0)
        bucket = distance
        if distance >= exact:
            share = np.log(distance / exact) / np.log(max_distance / exact)
            bucket = min(exact + int(share * (count - exact)), count - 1)
        bias[:, i, j] = numbers[bucket + (count if both and behind < 0 else 0)]
    return attention(query, key, value, attn_mask=attn_mask, bias=bias, is_causal=is_causal, scale=scale)


def alibi_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Attend with scores lowered by slope · distance, for a number of heads that is a power of two ({cite}`press2022`).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    H, L = np.shape(query)[1:3]
    S = np.shape(key)[2]
    slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
    bias = np.empty((H, L, S))
    for i in range(L):
        bias[:, i] = -slopes[:, None] * np.abs(_behind(i, L, S))
    return attention(query, key, value, attn_mask=attn_mask, bias=bias, is_causal=is_causal, scale=scale)


def rotary_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    base: float = 10000.0,
    pairing: str = "halves",
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Attend after turning each pair of components, a complex number, by e^(i·position·rate) ({cite}`su2024`, §3.2).

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        base: rate m is base^(−2m/D).
        pairing: "halves" or "interleaved".
        attn_mask: as for :func:`attention`.
        is_causal: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k = _float(query, key)
    L, S, half = q.shape[2], k.shape[2], q.shape[3] // 2
    for x, start in ((q := q.copy(), S - L), (k := k.copy(), 0)):
        for p, m in np.ndindex(x.shape[2], half):
            first, second = (m, m + half) if pairing == "halves" else (2 * m, 2 * m + 1)
            turn = np.exp(1j * (p + start) * base ** (-m / half))
            turned = (x[:, :, p, first] + 1j * x[:, :, p, second]) * turn
            x[:, :, p, first], x[:, :, p, second] = turned.real, turned.imag
    return attention(q, k, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def convolutional_spatial_transformer(features: ArrayLike, affine: ArrayLike, *, kernel_size: int = 3) -> Array:
    """Sample a transformed patch around each place, tap by tap ({cite}`choy2016`; {cite}`jaderberg2015`, eq. 5).

    Args:
        features: (B, C, H, W).
        affine: (B, 2, 3, H, W).
        kernel_size: k.
    Returns:
        (B, C, kH, kW) float64.
    """
    maps, a = _float(features, affine)
    B, C, H, W = maps.shape
    k = kernel_size
    output = np.zeros((B, C, k * H, k * W))
    for b, y, x, v, u in np.ndindex(B, H, W, k, k):
        px, py = np.array([x, y]) + a[b, :, :, y, x] @ [u - (k - 1) / 2, v - (k - 1) / 2, 1]
        for row, column in np.ndindex(H, W):
            share = max(0, 1 - abs(px - column)) * max(0, 1 - abs(py - row))
            output[b, :, k * y + v, k * x + u] += share * maps[b, :, row, column]
    return output


def soft_match(
    source: ArrayLike, target: ArrayLike, *, scale: float = 20.0, target_mask: ArrayLike | None = None
) -> Array:
    """Average the target's positions by the softmax of scaled cosines, place by place.

    Args:
        source: (B, C, H, W).
        target: (B, C, H', W').
        scale: factor of the cosines.
        target_mask: (B, H', W'), bool.
    Returns:
        (B, 2, H, W) float64: x and y.
    """
    f, g = _float(source, target)
    (B, _, H, W), (rows, columns) = f.shape, g.shape[2:]
    matched = np.zeros((B, 2, H, W))
    for b, y, x in np.ndindex(B, H, W):
        here = f[b, :, y, x]
        places, scores = [], []
        for row, column in np.ndindex(rows, columns):
            if target_mask is None or np.broadcast_to(target_mask, (B, rows, columns))[b, row, column]:
                there = g[b, :, row, column]
                places.append((column, row))
                scores.append(scale * (here @ there) / (np.linalg.norm(here) * np.linalg.norm(there)))
        if places:
            matched[b, :, y, x] = softmax(np.array(scores)) @ np.array(places)
    return matched
