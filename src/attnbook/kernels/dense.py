"""Exact attention on a GPU: which tiles the Triton kernels take, and how autograd calls them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.kernels.common import check_operand, on_device_of, padded, triton, unit_stride
from attnbook.kernels.dense_kernels import (
    FAR,
    LOG2E,
    Pairs,
    _backward_keys,
    _backward_queries,
    _forward,
    _row_sums,
)
from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.shapes import check_bias, check_count, check_tensor, describe, mismatch


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


# By the larger of the padded head sizes. Not tuned on a GPU yet: chosen so that the compiler for sm_90 needs at most
# 128 KiB of shared memory and hardly spills a register. float32 is multiplied without tensor cores, from registers.
HALF = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),
}
SINGLE = {
    64: Tiles(Tile(32, 32), Tile(32, 32), Tile(32, 32)),
    128: Tiles(Tile(32, 16), Tile(16, 32), Tile(32, 16)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def tiles_for(query: Tensor, value: Tensor, *, pairs: bool = False) -> Tiles:
    """Return the tiles that the kernels take by default.

    Args:
        query: of the call.
        value: of the call.
        pairs: whether a mask or a bias is read too; a tile of it needs room beside those of keys and values.
    """
    size = max(64, padded(query.shape[-1]), padded(value.shape[-1]))
    tiles = (SINGLE if query.dtype == torch.float32 else HALF)[size]
    return Tiles(*(tile._replace(stages=max(1, tile.stages - 1)) for tile in tiles)) if pairs else tiles


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
        alibi_slopes: (H,): slope times distance is taken off the scores, ends aligned ({cite}`press2022`).
        is_causal: let each query see its own position and earlier ones, ends aligned.
        window: how many keys a causal query sees, its own included; without ``is_causal``, the same number on either
            side (its own counted in both).
        scale: factor of the scores; 1/√D by default.
        tiles: sizes of the tiles; those of ``tiles_for`` by default, which need up to 128 KiB of shared memory.
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
    if tiles is None:
        tiles = tiles_for(query, value, pairs=mask is not None or bias is not None)
    return _Dense.apply(query, key, value, mask, bias, alibi_slopes, scale, least, most, tiles)
