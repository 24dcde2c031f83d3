"""Exact attention that builds the matrix of weights once, in place, and keeps it for a backward pass written out."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.mechanisms.tiles import Tiles
from attnbook.shapes import check_attention, check_bias, check_count, check_mask, check_query_and_key

# Rows are worked on in panels: a block of queries with all the keys that some of them may see. In tiles.py's letters:
#   q  (B·Hkv, G·Lb, D)     k  (B·Hkv, E, D)     v  (B·Hkv, E, Dv)     E keys; S of them, or fewer where causal
#   p  (B·Hkv, G·Lb, E)     the panel's weights: scores are written into it, and the softmax over them


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Tell whether this processor multiplies matrices of a half precision in hardware.

    Elsewhere it widens each element first, and products are many times slower than in float32.

    Args:
        dtype: bfloat16 or float16; other types are multiplied as they are.
    """
    features = torch.cpu.get_capabilities()
    wanted = {
        torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16", "fp16"),
    }
    return dtype not in wanted or any(features.get(name, False) for name in wanted[dtype])


def _narrow(query: Tensor) -> torch.dtype:
    """Return the type in which weights, and gradients of scores, are multiplied: half precision where that is fast.

    Scores, and what the softmax sums, are float32 everywhere.
    """
    fast = query.device.type != "cpu" or multiplies_fast(query.dtype)
    return query.dtype if fast else torch.promote_types(query.dtype, torch.float32)


def _clear_empty_rows(p: Tensor, top: Tensor) -> Tensor:
    """Turn the NaN that softmax makes of a row of −∞ into zeros."""
    return p.masked_fill_(top == -math.inf, 0.0)


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, bias, is_causal, scale, size, keep):
        tiles, narrow = Tiles(query, key, mask, bias, is_causal, size), _narrow(query)
        k, v = tiles.shared(key, slice(0, tiles.S)), tiles.shared(value, slice(0, tiles.S)).to(narrow)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        panels = []
        for rows in tiles.queries():
            end = tiles.end(rows)
            if end == 0:  # causal, and these queries come before the first key
                output[:, :, rows] = 0
                continue
            p = tiles.scores(tiles.stack(query, rows), k[:, :end], rows, slice(0, end), scale)
            some_may_be_empty = mask is not None or bias is not None or (is_causal and rows.start + tiles.S < tiles.L)
            top = p.amax(-1, keepdim=True) if some_may_be_empty else None
            torch.softmax(p, -1, out=p)
            if top is not None:
                _clear_empty_rows(p, top)
            p = p.to(narrow)
            _put_product(output, tiles, rows, p, v[:, :end])
            if keep:
                panels.append(p)
        ctx.save_for_backward(query, key, value, mask, bias, *panels)
        ctx.is_causal, ctx.scale, ctx.size = is_causal, scale, size
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, mask, bias, *panels = ctx.saved_tensors
        tiles, narrow = Tiles(query, key, mask, bias, ctx.is_causal, ctx.size), _narrow(query)
        k, v = tiles.shared(key, slice(0, tiles.S)).to(narrow), tiles.shared(value, slice(0, tiles.S))
        grad_query = query.new_zeros(query.shape)
        grad_key, grad_value = torch.zeros_like(k, dtype=tiles.work), torch.zeros_like(v)
        grad_bias = torch.zeros_like(bias, dtype=tiles.work) if ctx.needs_input_grad[4] else None
        waiting = iter(panels)
        for rows in tiles.queries():
            end = tiles.end(rows)
            if end == 0:
                continue
            p, q, go = next(waiting), tiles.stack(query, rows), tiles.stack(grad_output, rows)
            _add_product(grad_value[:, :end], p.transpose(1, 2), go.to(narrow))
            dp, p = torch.bmm(go, v[:, :end].transpose(1, 2)), p.to(tiles.work)
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)  # p ∘ (dp − Σ p ∘ dp)
            if grad_bias is not None:
                tiles.add_to_bias_gradient(grad_bias, ds, rows, slice(0, end))
            ds = ds.mul_(ctx.scale).to(narrow)
            _put_product(grad_query, tiles, rows, ds, k[:, :end])
            _add_product(grad_key[:, :end], ds.transpose(1, 2), q.to(narrow))
        grad_key, grad_value = grad_key.view(key.shape).to(key.dtype), grad_value.view(value.shape).to(value.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_query, grad_key, grad_value, None, grad_bias, None, None, None, None


def _put_product(x: Tensor, tiles: Tiles, rows: slice, a: Tensor, b: Tensor) -> None:
    """Write a b into rows of (B, H, L, …), without a copy where the layout allows it."""
    if tiles.G == 1 and x.dtype == a.dtype and x.is_contiguous():
        torch.bmm(a, b, out=x.view(-1, *x.shape[2:])[:, rows])
    else:
        x[:, :, rows] = tiles.unstack(torch.bmm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a sum, which may be of a wider type."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def stored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Compute exact softmax attention with the weights stored, each row's softmax at once and in place.

    Computes softmax(Q Kᵀ · scale + bias) V ({cite}`vaswani2017`, eq. 1) in panels of rows; causal panels end at their
    last visible key, which saves almost half of the work and of the memory. The backward pass reads the stored weights
    instead of computing them again, as fused kernels do: on a processor that is quicker while they fit in memory.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        bias: broadcastable to (B, H, L, S), float, added to the scaled scores.
        is_causal: let each query see its own position and earlier ones, ends aligned.
        scale: factor of the scores; 1/√D by default.
        block_size: rows of a panel; by default chosen by the shape.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once in query, key, value and bias.
    Raises:
        ValueError: shapes, types or a block size that do not fit; NaN in query, key or bias.
    Cost: O(LSD) time; O(LS) memory where a gradient is wanted, O(S) beyond inputs and output where none is.
    """
    shape = check_attention(query, key, value)
    check_query_and_key(query, key)
    target = (shape.B, shape.H, shape.L, shape.S)
    if attn_mask is not None:
        attn_mask = check_mask("attn_mask", attn_mask, target)
    if bias is not None:
        bias = check_bias("bias", bias, target)
    scale = shape.D**-0.5 if scale is None else float(scale)
    if block_size is not None:
        check_count("block_size", block_size)
    return stored(query, key, value, attn_mask, bias, is_causal, scale, block_size)


def stored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    block_size: int | None = None,
) -> Tensor:
    """Do what :func:`stored_attention` does, for arguments that are checked.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        mask: with four axes, or None.
        bias: with four axes, or None.
        is_causal: as there.
        scale: factor of the scores.
        block_size: rows of a panel, or None.
    """
    if block_size is None:  # a short panel wastes less beyond the diagonal, a tall one multiplies faster
        block_size = 256 if not is_causal else 128 if query.shape[2] > 256 else 64
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, bias))
    return _Stored.apply(query, key, value, mask, bias, is_causal, scale, block_size, keep)
