"""The Triton kernels of exact attention: one for the output, one for dK and dV, one for dQ.

Everything is computed in units of log 2, because a GPU has exp2 in hardware: with z = log2(e) · (q·k · scale + bias),
exp(score − lse) = exp2(z − lse₂), where lse₂ = log2 Σ exp2(z) is kept for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from attnbook.kernels.common import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))
FAR = 2**30  # a distance that no pair of positions has


class Pairs(NamedTuple):
    """What single pairs of positions are told: pointers (or None) and strides, 0 along broadcast axes.

    Attributes:
        mask: (B, H, L, S) uint8, 0 where attention is not allowed.
        mask_strides: of its four axes.
        bias: (B, H, L, S) float.
        bias_strides: of its four axes.
        slopes: (H,) float32, ALiBi's.
        least: the smallest distance i + S − L − j at which query i sees key j.
        most: the largest.
    """

    mask: Any
    mask_strides: Any
    bias: Any
    bias_strides: Any
    slopes: Any
    least: Any
    most: Any


@triton.jit
def _load(x, stride, rows, height, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr):
    """Load the rows of a matrix (height, WIDTH) → (rows, PADDED); zeros beyond its edges."""
    columns = tl.arange(0, PADDED)
    x += rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if CHECK and WIDTH < PADDED:
        return tl.load(x, mask=(rows[:, None] < height) & (columns[None, :] < WIDTH), other=0.0)
    if CHECK:
        return tl.load(x, mask=rows[:, None] < height, other=0.0)
    if WIDTH < PADDED:
        return tl.load(x, mask=columns[None, :] < WIDTH, other=0.0)
    return tl.load(x)


@triton.jit
def _store(x, tile, rows, height, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store a tile (rows, PADDED) into the rows of a contiguous matrix (height, WIDTH)."""
    columns = tl.arange(0, PADDED)
    inside = (rows[:, None] < height) & (columns[None, :] < WIDTH)
    tl.store(x + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _ranges(first, size, low, high, count, STEP: tl.constexpr):
    """Find the partners y of x = first … first + size − 1, where x + low ≤ y ≤ x + high and 0 ≤ y < count.

    Between start and stop some x has a partner; between the inner bounds every y is a partner of every x.
    """
    start = tl.maximum(first + low, 0) // STEP * STEP
    stop = tl.maximum(tl.minimum(first + size + high, count), 0)
    inner_start = tl.cdiv(tl.maximum(first + size - 1 + low, 0), STEP) * STEP
    inner_start = tl.minimum(tl.maximum(inner_start, start), stop)
    inner_stop = tl.maximum(tl.minimum(first + high + 1, count), 0) // STEP * STEP
    return start, inner_start, tl.maximum(inner_stop, inner_start), stop


@triton.jit
def _at(strides, b, h, i, j):
    """Return where pair (i, j) lies in a tensor (B, H, L, S)."""
    return b * strides[0] + h * strides[1] + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3]


@triton.jit
def _scores(s, i, j, b, h, pairs, scale, L, S, EDGE: tl.constexpr):
    """Turn products q·k into scores; i and j are the positions, shaped to broadcast to s.

    Returns the scores and a factor that they still need. The factor is positive, so that a maximum may be taken before
    it is applied: one multiplication less for each pair where nothing is added to the scores.
    """
    factor = scale
    behind = i + (S - L) - j  # how far the key stands behind the query
    if pairs.bias is not None or pairs.slopes is not None:
        s = s * scale
        factor = 1.0
    if pairs.bias is not None:
        bias = tl.load(pairs.bias + _at(pairs.bias_strides, b, h, i, j), mask=(i < L) & (j < S), other=0.0)
        s += bias.to(tl.float32) * LOG2E
    if pairs.slopes is not None:
        s -= tl.load(pairs.slopes + h) * LOG2E * tl.abs(behind)
    if pairs.mask is not None:
        allowed = tl.load(pairs.mask + _at(pairs.mask_strides, b, h, i, j), mask=(i < L) & (j < S), other=0)
        s = tl.where(allowed != 0, s, -float("inf"))
    if EDGE:  # the tile reaches over the diagonal, out of the window, or beyond the last key
        s = tl.where((behind >= pairs.least) & (behind <= pairs.most) & (j < S), s, -float("inf"))
    return s, factor


@triton.jit
def _forward(
    q, k, v, o, lse, q_strides, k_strides, v_strides, pairs, scale, H, G, L, S,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Compute the output and lse₂ of one block of queries of one head."""
    blocks = tl.cdiv(L, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # the last queries have the most keys: they start first
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + (h // G) * k_strides[1]  # G query heads share a key–value head
    v += b * v_strides[0] + (h // G) * v_strides[1]
    rows = block * ROWS + tl.arange(0, ROWS)
    q_tile = _load(q, q_strides[2], rows, L, D, DP, True)  # (ROWS, DP)

    o_tile = tl.zeros([ROWS, DVP], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)  # the largest score so far
    total = tl.zeros([ROWS], tl.float32)  # Σ exp2(score − top)
    bounds = _ranges(block * ROWS, ROWS, S - L - pairs.most, S - L - pairs.least, S, COLUMNS)
    for part in tl.static_range(3):  # keys at the near edge, keys that all these queries see, keys at the far edge
        if part > 0 or WINDOWED:
            for first in range(bounds[part], bounds[part + 1], COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                k_tile = _load(k, k_strides[2], columns, S, D, DP, part != 1)  # (COLUMNS, DP)
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (ROWS, DP) @ (DP, COLUMNS)
                s, factor = _scores(s, rows[:, None], columns[None, :], b, h, pairs, scale, L, S, part != 1)
                new_top = tl.maximum(top, tl.max(s, 1) * factor)  # (ROWS,)
                shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen yet: exp2(−∞ − 0), not NaN
                p = tl.exp2(s * factor - shift[:, None])  # (ROWS, COLUMNS)
                shrink = tl.exp2(top - shift)  # what is summed up so far was relative to the old top
                total = total * shrink + tl.sum(p, 1)
                v_tile = _load(v, v_strides[2], columns, S, DV, DVP, part != 1)  # (COLUMNS, DVP)
                o_tile = o_tile * shrink[:, None]
                o_tile = tl.dot(p.to(v_tile.dtype), v_tile, o_tile, input_precision="ieee")  # (ROWS, DVP)
                top = new_top

    # An empty row is noted as +∞, so that the backward pass finds exp2(s − ∞) = 0 there without asking.
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    lse_tile = tl.where(empty, float("inf"), top + tl.log2(total))
    _store(o + head * L * DV, o_tile / total[:, None], rows, L, DV, DVP)
    tl.store(lse + head * L + rows, lse_tile, mask=rows < L)


# With P the weights, G the gradient of the output and Δ = rowsum(P ∘ (G Vᵀ)) = rowsum(G ∘ O):
#   dV = Pᵀ G     dZ = P ∘ (G Vᵀ − Δ)     dQ = dZ K · scale     dK = dZᵀ Q · scale     dbias = dZ


@triton.jit
def _row_sums(o, grad, delta, count, DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr):
    """Compute Δ = rowsum(G ∘ O) for a block of rows of all heads together."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_tile = _load(o, DV, rows, count, DV, DVP, True).to(tl.float32)  # (ROWS, DVP)
    grad_tile = _load(grad, DV, rows, count, DV, DVP, True).to(tl.float32)
    tl.store(delta + rows, tl.sum(o_tile * grad_tile, 1), mask=rows < count)


@triton.jit
def _backward_keys(
    q, k, v, grad, lse, delta, dk, dv, q_strides, k_strides, v_strides, pairs, scale, dz_scale, H, G, L, S,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONE_SIDED: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one block of keys, summed over the query heads that share it; tiles lie transposed."""
    blocks = tl.cdiv(S, COLUMNS)
    block = tl.program_id(0) % blocks  # the first keys have the most queries
    shared = (tl.program_id(0) // blocks).to(tl.int64)  # b · Hkv + the key–value head
    b, first_h = shared // (H // G), shared % (H // G) * G
    k += b * k_strides[0] + first_h // G * k_strides[1]
    v += b * v_strides[0] + first_h // G * v_strides[1]
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    k_tile = _load(k, k_strides[2], columns, S, D, DP, True)  # (COLUMNS, DP)
    v_tile = _load(v, v_strides[2], columns, S, DV, DVP, True)  # (COLUMNS, DVP)

    dk_tile = tl.zeros([COLUMNS, DP], tl.float32)
    dv_tile = tl.zeros([COLUMNS, DVP], tl.float32)
    bounds = _ranges(block * COLUMNS, COLUMNS, pairs.least - (S - L), pairs.most - (S - L), L, ROWS)
    for g in range(G):
        h = first_h + g
        row = (b * H + h) * L
        for part in tl.static_range(3):
            if part > 0 or ONE_SIDED:
                for first in range(bounds[part], bounds[part + 1], ROWS):
                    rows = first + tl.arange(0, ROWS)
                    q_tile = _load(q + b * q_strides[0] + h * q_strides[1], q_strides[2], rows, L, D, DP, part != 1)
                    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # (COLUMNS, DP) @ (DP, ROWS)
                    s, factor = _scores(s, rows[None, :], columns[:, None], b, h, pairs, scale, L, S, part != 1)
                    lse_tile = tl.load(lse + row + rows, mask=rows < L, other=float("inf"))  # (ROWS,)
                    p = tl.exp2(s * factor - lse_tile[None, :])  # (COLUMNS, ROWS)
                    grad_tile = _load(grad + row * DV, DV, rows, L, DV, DVP, part != 1)  # (ROWS, DVP)
                    dv_tile = tl.dot(
                        p.to(grad_tile.dtype), grad_tile, dv_tile, input_precision="ieee"
                    )  # (COLUMNS, DVP)
                    dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")  # (COLUMNS, DVP) @ (DVP, ROWS)
                    delta_tile = tl.load(delta + row + rows, mask=rows < L, other=0.0)  # (ROWS,)
                    dz = p * (dp - delta_tile[None, :])
                    dk_tile = tl.dot(dz.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")  # (COLUMNS, DP)
    _store(dk + shared * S * D, dk_tile * dz_scale, columns, S, D, DP)
    _store(dv + shared * S * DV, dv_tile, columns, S, DV, DVP)


@triton.jit
def _backward_queries(
    q, k, v, grad, lse, delta, dq, dbias, q_strides, k_strides, v_strides, dbias_strides, pairs, scale, dz_scale,
    H, G, L, S,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Compute dQ of one block of queries, and add its part to the gradient of the bias."""
    blocks = tl.cdiv(L, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + (h // G) * k_strides[1]
    v += b * v_strides[0] + (h // G) * v_strides[1]
    rows = block * ROWS + tl.arange(0, ROWS)
    q_tile = _load(q, q_strides[2], rows, L, D, DP, True)  # (ROWS, DP)
    grad_tile = _load(grad + head * L * DV, DV, rows, L, DV, DVP, True)  # (ROWS, DVP)
    lse_tile = tl.load(lse + head * L + rows, mask=rows < L, other=float("inf"))  # (ROWS,)
    delta_tile = tl.load(delta + head * L + rows, mask=rows < L, other=0.0)  # (ROWS,)

    dq_tile = tl.zeros([ROWS, DP], tl.float32)
    bounds = _ranges(block * ROWS, ROWS, S - L - pairs.most, S - L - pairs.least, S, COLUMNS)
    for part in tl.static_range(3):
        if part > 0 or WINDOWED:
            for first in range(bounds[part], bounds[part + 1], COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                k_tile = _load(k, k_strides[2], columns, S, D, DP, part != 1)  # (COLUMNS, DP)
                v_tile = _load(v, v_strides[2], columns, S, DV, DVP, part != 1)  # (COLUMNS, DVP)
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (ROWS, DP) @ (DP, COLUMNS)
                s, factor = _scores(s, rows[:, None], columns[None, :], b, h, pairs, scale, L, S, part != 1)
                p = tl.exp2(s * factor - lse_tile[:, None])  # (ROWS, COLUMNS)
                dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")  # (ROWS, DVP) @ (DVP, COLUMNS)
                dz = p * (dp - delta_tile[:, None])
                dq_tile = tl.dot(dz.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")  # (ROWS, DP)
                if dbias is not None:  # pairs that share an element of the bias add up, in whatever order they come
                    i, j = rows[:, None], columns[None, :]
                    tl.atomic_add(dbias + _at(dbias_strides, b, h, i, j), dz, mask=(i < L) & (j < S))
    _store(dq + head * L * D, dq_tile * dz_scale, rows, L, D, DP)
