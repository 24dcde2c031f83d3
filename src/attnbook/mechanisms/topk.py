"""Top-k attention: each query keeps the keys with its k largest scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.mechanisms.tiles import Tiles
from attnbook.shapes import check_count


def _kept_weights(tiles: Tiles, q: Tensor, keys: Tensor, rows: slice, k: int, scale: float) -> Tensor:
    """Return the softmax over the k largest scores of a block of queries: (B·Hkv, G·Lb, Sb)."""
    s = tiles.scores(q, keys, rows, slice(0, keys.shape[1]), scale)
    if k < s.shape[-1]:
        s.masked_fill_(s < s.topk(k).values[..., -1:], -math.inf)
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top.masked_fill_(top == -math.inf, 0.0)).exp_()  # an empty row: exp(−∞ − 0) = 0
    return p.div_(p.sum(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny))


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, is_causal, scale, k, size):
        tiles = Tiles(query, key, mask, None, is_causal, size)
        keys, values = (tiles.shared(x, slice(None)) for x in (key, value))
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        for rows in tiles.queries():
            if end := tiles.end(rows):
                p = _kept_weights(tiles, tiles.stack(query, rows), keys[:, :end], rows, k, scale)
                output[:, :, rows] = tiles.unstack(p @ values[:, :end]).to(output.dtype)
        ctx.save_for_backward(query, key, value, mask)
        ctx.is_causal, ctx.scale, ctx.k, ctx.size = is_causal, scale, k, size
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, mask = ctx.saved_tensors
        tiles = Tiles(query, key, mask, None, ctx.is_causal, ctx.size)
        keys, values = (tiles.shared(x, slice(None)) for x in (key, value))
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for rows in tiles.queries():
            if not (end := tiles.end(rows)):
                continue
            q, go = tiles.stack(query, rows), tiles.stack(grad_output, rows)
            p = _kept_weights(tiles, q, keys[:, :end], rows, ctx.k, ctx.scale)  # chosen again, not stored
            grad_value[:, :end].baddbmm_(p.transpose(1, 2), go)
            ds = go @ values[:, :end].transpose(1, 2)  # dP; then dZ = P ∘ (dP − rowsum(P ∘ dP)): zero where P is
            ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
            grad_query[:, :, rows] = tiles.unstack(ds @ keys[:, :end]).to(query.dtype)
            grad_key[:, :end].baddbmm_(ds.transpose(1, 2), q)
        grad_key, grad_value = grad_key.view(key.shape).to(key.dtype), grad_value.view(value.shape).to(value.dtype)
        return grad_query, grad_key, grad_value, None, None, None, None, None


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 128,
) -> Tensor:
    """Compute softmax attention over the k largest scores of each query.

    {cite}`zhao2019`, with the queries in blocks as in {cite}`gupta2021`. Scores equal to the k-th are all kept.
    With k ≥ S it is exact. Else let δ be the weight that exact attention gives to the dropped keys: then
    ``‖output − exact‖ ≤ 2 δ · max ‖v‖``, for the kept weights p grow to p / (1 − δ), which adds
    p δ / (1 − δ), δ in all, and the dropped ones, δ in all, are missing.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        k: how many keys a query keeps.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend. The k are chosen among those allowed.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
        block_size: how many queries are scored at a time.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once; no gradient reaches the keys that were dropped.
    Raises:
        ValueError: shapes or types that do not match, NaN, k or block_size below 1.
    Cost: O(LSD) time, for every pair is scored, and again in the backward pass; O(S·block_size) memory.
    Differs from the papers: values are mixed by a matrix product with the zeros in place, which is faster than
    gathering k of them, and the choice is made again in the backward pass rather than stored.
    """
    shape = check_call(query, key, value)
    mask = check_pair_mask(attn_mask, shape)
    check_count("k", k)
    check_count("block_size", block_size)
    scale = shape.D**-0.5 if scale is None else float(scale)
    return _TopK.apply(query, key, value, mask, is_causal, scale, k, block_size)
