"""Exact attention in tiles, without ever building the L × S matrix (FlashAttention's algorithm in plain PyTorch)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.mechanisms.online_softmax import OnlineSoftmax
from attnbook.mechanisms.tiles import Tiles
from attnbook.shapes import check_attention, check_bias, check_count, check_mask, check_query_and_key


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, bias, is_causal, scale, size, width):
        tiles = Tiles(query, key, mask, bias, is_causal, size, width)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        log_sums = torch.empty(tiles.B, tiles.H, tiles.L, 1, dtype=tiles.work, device=query.device)
        for rows in tiles.queries():
            q = tiles.stack(query, rows)
            state = OnlineSoftmax.empty(q, value.shape[3])
            for columns in tiles.keys(rows):
                s = tiles.scores(q, tiles.shared(key, columns), rows, columns, scale)
                state.absorb(s, tiles.shared(value, columns))
            output[:, :, rows] = tiles.unstack(state.output()).to(output.dtype)
            log_sums[:, :, rows] = tiles.unstack(state.log_sum())
        ctx.save_for_backward(query, key, value, mask, bias, output, log_sums)
        ctx.is_causal, ctx.scale, ctx.size = is_causal, scale, (size, width)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, mask, bias, output, log_sums = ctx.saved_tensors
        tiles = Tiles(query, key, mask, bias, ctx.is_causal, *ctx.size)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(tiles.B * tiles.Hkv, tiles.S, tiles.D, dtype=tiles.work, device=key.device)
        grad_value = torch.zeros(*grad_key.shape[:2], value.shape[3], dtype=tiles.work, device=key.device)
        grad_bias = torch.zeros_like(bias, dtype=tiles.work) if ctx.needs_input_grad[4] else None
        for rows in tiles.queries():
            q, go, o, lse = (tiles.stack(x, rows) for x in (query, grad_output, output, log_sums))
            lse = lse.masked_fill(lse == -math.inf, 0.0)  # an empty row: exp(−∞ − 0) = 0, not NaN
            delta = (go * o).sum(-1, keepdim=True)  # rowsum(P ∘ dP), got from the output alone
            dq = torch.zeros_like(q)
            for columns in tiles.keys(rows):
                k, v = tiles.shared(key, columns), tiles.shared(value, columns)
                p = tiles.scores(q, k, rows, columns, ctx.scale).sub_(lse).exp_()  # recomputed, not stored
                grad_value[:, columns].baddbmm_(p.transpose(1, 2), go)
                ds = torch.bmm(go, v.transpose(1, 2)).sub_(delta).mul_(p)
                dq.baddbmm_(ds, k, alpha=ctx.scale)
                grad_key[:, columns].baddbmm_(ds.transpose(1, 2), q, alpha=ctx.scale)
                if grad_bias is not None:
                    tiles.add_to_bias_gradient(grad_bias, ds, rows, columns)
            grad_query[:, :, rows] = tiles.unstack(dq).to(query.dtype)
        grad_key, grad_value = grad_key.view_as(key).to(key.dtype), grad_value.view_as(value).to(value.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_query, grad_key, grad_value, None, grad_bias, None, None, None, None


def tiled_attention(
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
    """Compute exact softmax attention tile by tile, in memory linear in L and S.

    Forward: online softmax over blocks of keys ({cite}`milakov2018`; {cite}`dao2022`, algorithm 1, with the loops in
    the order of {cite}`dao2024`, algorithm 1). Backward: the tiles' weights are computed again from the logarithm of
    each row's sum ({cite}`dao2022`, algorithm 4). Chapter: {ref}`sec-15-flash`.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        bias: broadcastable to (B, H, L, S), float, added to the scaled scores.
        is_causal: let each query see its own position and earlier ones, ends aligned; tiles beyond are never computed.
        scale: factor of the scores; 1/√D by default.
        block_size: rows and columns of a tile; by default 128 rows and 1,024 columns, which is quickest on a processor.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once in query, key, value and bias.
    Raises:
        ValueError: shapes, types or a block size that do not fit; NaN in query, key or bias.
    Cost: O(LSD) time, O(L + S) memory beyond inputs and output; the backward pass computes the scores a second time.
    """
    shape = check_attention(query, key, value)
    if block_size is not None:
        check_count("block_size", block_size)
    check_query_and_key(query, key)
    target = (shape.B, shape.H, shape.L, shape.S)
    if attn_mask is not None:
        attn_mask = check_mask("attn_mask", attn_mask, target)
    if bias is not None:
        bias = check_bias("bias", bias, target)
    scale = shape.D**-0.5 if scale is None else float(scale)
    rows, columns = (128, 1024) if block_size is None else (block_size, block_size)
    return _Tiled.apply(query, key, value, attn_mask, bias, is_causal, scale, rows, columns)
