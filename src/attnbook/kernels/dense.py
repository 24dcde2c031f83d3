"""Exact attention as Triton kernels: one for the output, one for dK and dV, one for dQ (FlashAttention-2's algorithm).

Everything is computed in units of log 2, because a GPU has exp2 in hardware: with z = log2(e) · (q·k · scale + bias),
exp(score − lse) = exp2(z − lse₂), where lse₂ = log2 Σ exp2(z) is kept for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.kernels.common import check_operand, on_device_of, padded, tl, triton, unit_stride
from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.shapes import check_bias, check_count, check_tensor, describe, mismatch

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
    return b * strides[0] + h * strides[1] + i.to(tl.int64) * strides[2] + j * strides[3]


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
        EDGE: tl.constexpr = part != 1
        if part > 0 or WINDOWED:
            for first in range(bounds[part], bounds[part + 1], COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                k_tile = _load(k, k_strides[2], columns, S, D, DP, EDGE)  # (COLUMNS, DP)
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (ROWS, DP) @ (DP, COLUMNS)
                s, factor = _scores(s, rows[:, None], columns[None, :], b, h, pairs, scale, L, S, EDGE)
                new_top = tl.maximum(top, tl.max(s, 1) * factor)  # (ROWS,)
                shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen yet: exp2(−∞ − 0), not NaN
                p = tl.exp2(s * factor - shift[:, None])  # (ROWS, COLUMNS)
                shrink = tl.exp2(top - shift)  # what is summed up so far was relative to the old top
                total = total * shrink + tl.sum(p, 1)
                v_tile = _load(v, v_strides[2], columns, S, DV, DVP, EDGE)  # (COLUMNS, DVP)
                o_tile = o_tile * shrink[:, None]
                o_tile = tl.dot(p.to(v_tile.dtype), v_tile, o_tile, input_precision="ieee")  # (ROWS, DVP)
                top = new_top

    o_tile /= tl.where(total == 0, 1.0, total)[:, None]
    _store(o + head * L * DV, o_tile, rows, L, DV, DVP)
    # An empty row is noted as +∞, so that the backward pass finds exp2(s − ∞) = 0 there without asking.
    tl.store(lse + head * L + rows, tl.where(total == 0, float("inf"), top + tl.log2(total)), mask=rows < L)


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
            EDGE: tl.constexpr = part != 1
            if part > 0 or ONE_SIDED:
                for first in range(bounds[part], bounds[part + 1], ROWS):
                    rows = first + tl.arange(0, ROWS)
                    q_tile = _load(q + b * q_strides[0] + h * q_strides[1], q_strides[2], rows, L, D, DP, EDGE)
                    s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # (COLUMNS, DP) @ (DP, ROWS)
                    s, factor = _scores(s, rows[None, :], columns[:, None], b, h, pairs, scale, L, S, EDGE)
                    lse_tile = tl.load(lse + row + rows, mask=rows < L, other=float("inf"))  # (ROWS,)
                    p = tl.exp2(s * factor - lse_tile[None, :])  # (COLUMNS, ROWS)
                    grad_tile = _load(grad + row * DV, DV, rows, L, DV, DVP, EDGE)  # (ROWS, DVP)
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
        EDGE: tl.constexpr = part != 1
        if part > 0 or WINDOWED:
            for first in range(bounds[part], bounds[part + 1], COLUMNS):
                columns = first + tl.arange(0, COLUMNS)
                k_tile = _load(k, k_strides[2], columns, S, D, DP, EDGE)  # (COLUMNS, DP)
                v_tile = _load(v, v_strides[2], columns, S, DV, DVP, EDGE)  # (COLUMNS, DVP)
                s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (ROWS, DP) @ (DP, COLUMNS)
                s, factor = _scores(s, rows[:, None], columns[None, :], b, h, pairs, scale, L, S, EDGE)
                p = tl.exp2(s * factor - lse_tile[:, None])  # (ROWS, COLUMNS)
                dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")  # (ROWS, DVP) @ (DVP, COLUMNS)
                dz = p * (dp - delta_tile[:, None])
                dq_tile = tl.dot(dz.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")  # (ROWS, DP)
                if dbias is not None:  # pairs that share an element of the bias add up, in whatever order they come
                    i, j = rows[:, None], columns[None, :]
                    tl.atomic_add(dbias + _at(dbias_strides, b, h, i, j), dz, mask=(i < L) & (j < S))
    _store(dq + head * L * D, dq_tile * dz_scale, rows, L, D, DP)


class Tile(NamedTuple):
    """The shape of a kernel's tiles, and how a GPU works on them.

    Attributes:
        rows: queries in a tile.
        columns: keys.
        warps: groups of 32 threads that work on a tile together.
        stages: tiles being loaded or used at a time.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    """The tiles of the three kernels.

    Attributes:
        forward: of the forward pass.
        keys: of the kernel for dK and dV.
        queries: of the kernel for dQ.
    """

    forward: Tile
    keys: Tile
    queries: Tile


# By the larger of the padded head sizes; float32 is multiplied without tensor cores, from registers. Start of tuning:
# what fits into the registers and the 227 KiB of shared memory of a Hopper multiprocessor, without spilling.
HALF = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),
}
SINGLE = {
    64: Tiles(Tile(32, 32), Tile(32, 32), Tile(32, 32)),
    128: Tiles(Tile(32, 32), Tile(16, 32), Tile(32, 16)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def tiles_for(query: Tensor, value: Tensor) -> Tiles:
    """Return the tiles that the kernels take by default.

    Args:
        query: of the call.
        value: of the call.
    """
    size = max(64, padded(query.shape[-1]), padded(value.shape[-1]))
    return (SINGLE if query.dtype == torch.float32 else HALF)[size]


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, bias, slopes, scale, least, most, tiles):
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        B, H, L, D = query.shape
        Hkv, S, DV = value.shape[1:]
        output = query.new_empty(B, H, L, DV)
        lse = torch.empty(B, H, L, dtype=torch.float32, device=query.device)
        full = (B, H, L, S)
        pairs = Pairs(
            None if mask is None else mask.view(torch.uint8),
            None if mask is None else mask.expand(full).stride(),
            None if bias is None else bias.detach(),
            None if bias is None else bias.expand(full).stride(),
            slopes,
            least,
            most,
        )
        sizes = (H, H // Hkv, L, S, D, DV, padded(D), padded(DV))
        strides = (query.stride()[:3], key.stride()[:3], value.stride()[:3])
        tile = tiles.forward
        with on_device_of(query):
            _forward[(triton.cdiv(L, tile.rows) * B * H,)](
                query, key, value, output, lse, *strides, pairs, scale * LOG2E.value, *sizes, tile.rows, tile.columns,
                most < FAR, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, mask, bias, slopes, output, lse)
        ctx.scale, ctx.pairs, ctx.tiles = scale, pairs, tiles
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, _, bias, _, output, lse = ctx.saved_tensors
        B, H, L, D = query.shape
        Hkv, S, DV = value.shape[1:]
        grad = grad_output.contiguous()
        delta = torch.empty_like(lse)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        dbias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[4] else None
        dbias_strides = None if dbias is None else dbias.expand(B, H, L, S).stride()
        sizes = (H, H // Hkv, L, S, D, DV, padded(D), padded(DV))
        strides = (query.stride()[:3], key.stride()[:3], value.stride()[:3])
        pairs, scales, windowed = ctx.pairs, (ctx.scale * LOG2E.value, ctx.scale), ctx.pairs.most < FAR
        with on_device_of(query):
            _row_sums[(triton.cdiv(B * H * L, 64),)](output, grad, delta, B * H * L, DV, padded(DV), 64)
            tile = ctx.tiles.keys
            _backward_keys[(triton.cdiv(S, tile.columns) * B * Hkv,)](
                query, key, value, grad, lse, delta, dk, dv, *strides, pairs, *scales, *sizes, tile.rows, tile.columns,
                windowed or pairs.least > -FAR, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            tile = ctx.tiles.queries
            _backward_queries[(triton.cdiv(L, tile.rows) * B * H,)](
                query, key, value, grad, lse, delta, dq, dbias, *strides, dbias_strides, pairs, *scales, *sizes,
                tile.rows, tile.columns, windowed, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dq, dk, dv, None, dbias, None, None, None, None, None


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Compute exact softmax attention with Triton kernels on a GPU.

    Forward: {cite}`dao2024`, algorithm 1. Backward: its algorithm 2, differs from the paper: split into a kernel for dK
    and dV and one for dQ, so that nothing but the gradient of a bias is added up atomically; that costs two more
    products for each tile, seven for five. Tiles that no query sees are never computed. Chapter: {ref}`sec-15-flash`.

    Args:
        query: (B, H, L, D) float32, float16 or bfloat16; D at most 256.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv), Dv at most 256.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend. Read tile by tile; skips none.
        bias: broadcastable to (B, H, L, S), float, added to the scaled scores.
        alibi_slopes: (H,), positive for ALiBi; slope times distance is taken off the scores, ends aligned.
        is_causal: let each query see its own position and earlier ones, ends aligned.
        window: how many keys a causal query sees, its own included; without ``is_causal``, the same number on either
            side (its own counted in both).
        scale: factor of the scores; 1/√D by default.
        tiles: sizes of the tiles; those of :func:`tiles_for` by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once in query, key, value and bias.
    Raises:
        ValueError: shapes or types that do not fit; tensors not on a GPU, unless Triton's interpreter runs; slopes that
            want a gradient; a scale that is not finite.
    Cost: O(LSD) time, O(L + S) memory beyond inputs and output; the backward pass computes the scores twice more.
    """
    for name, x, axes in (("query", query, "B H L D"), ("key", key, "B Hkv S D"), ("value", value, "B Hkv S Dv")):
        check_operand(name, x, axes)
        if x.shape[-1] > 256:
            raise mismatch(name, "heads of at most 256 components", x)
    shape = check_call(query, key, value)
    mask = check_pair_mask(attn_mask, shape)
    if bias is not None:
        bias = check_bias("bias", bias, (shape.B, shape.H, shape.L, shape.S))
    for name, x in (("attn_mask", mask), ("bias", bias)):
        if x is not None and x.device != query.device:
            raise mismatch(name, f"device {query.device}, that of query", f"device {x.device}")
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes, "H")
        if alibi_slopes.shape[0] != shape.H or alibi_slopes.requires_grad:
            raise mismatch("alibi_slopes", f"H = {shape.H} numbers that want no gradient", alibi_slopes)
        alibi_slopes = alibi_slopes.to(query.device, torch.float32).contiguous()
    scale = shape.D**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise mismatch("scale", "a finite number", describe(scale))
    if scale <= 0:  # the kernels take the largest score before they scale
        query, scale = query * (-1.0 if scale else 0.0), -scale or 1.0
    # Query i sees the keys at distances least ≤ i + S − L − j ≤ most.
    most = FAR if window is None else check_count("window", window) - 1
    least = 0 if is_causal else -most
    tiles = tiles_for(query, value) if tiles is None else tiles
    return _Dense.apply(query, key, value, mask, bias, alibi_slopes, scale, least, most, tiles)
