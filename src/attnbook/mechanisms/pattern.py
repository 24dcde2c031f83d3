"""Attention over a fixed sparse pattern: its pairs are covered by small dense tiles, and nothing else is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from attnbook import masks
from attnbook.mechanisms.common import working_type

ROWS = 64  # queries of a tile: few, so that little is computed outside the pattern; enough for a matrix product


class Tile(NamedTuple):
    """Some queries, and every key that they may see; each query is in one tile of a pattern at most.

    Attributes:
        rows: the queries' indices, a range or (Lb,) int64.
        columns: the keys' indices, all different, a range or (Sb,) int64.
        mask: (Lb, Sb) bool, True = may attend, no row empty; None where all pairs are allowed.
        is_causal: the last query sees all columns, the one before it all but the last, and so on; mask is None then.
        batch: the one sequence meant; None for all.
        head: the one query head meant; None for all.
    """

    rows: range | Tensor
    columns: range | Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    batch: int | None = None
    head: int | None = None

    def pieces(self, device: torch.device) -> Iterator[Tile]:
        """Cut a tall tile, so that the scores of a piece are few; no piece is marked causal, it has a mask instead.

        Args:
            device: where to make masks.
        """
        ahead = len(self.columns) - len(self.rows)
        for start in range(0, len(self.rows), ROWS):
            rows = self.rows[start : start + ROWS]
            columns, mask = self.columns, None if self.mask is None else self.mask[start : start + ROWS]
            if self.is_causal:
                columns = columns[: ahead + start + len(rows)]
                mask = masks.causal(len(rows), len(columns), device=device)
            yield self._replace(rows=rows, columns=columns, mask=mask, is_causal=False)


def _where(tile: Tile, index: range | Tensor, group: int = 1) -> tuple[slice, slice, slice | Tensor]:
    """Return what to write in brackets behind a (B, heads, positions, …) tensor to cut a tile's part out of it."""
    batch = slice(None) if tile.batch is None else slice(tile.batch, tile.batch + 1)
    head = slice(None) if tile.head is None else slice(tile.head // group, tile.head // group + 1)
    return batch, head, slice(index.start, index.stop, index.step) if isinstance(index, range) else index


class _Pattern:
    """A call's tiles and masks."""

    def __init__(self, query: Tensor, key: Tensor, tiles: Sequence[Tile], attn_mask: Tensor | None, scale: float):
        self.group = query.shape[1] // key.shape[1]
        self.tiles, self.attn_mask, self.scale = tiles, attn_mask, scale

    def queries(self, x: Tensor, tile: Tile) -> Tensor:
        """(B, H, L, X) → (b, h, Lb, X), or a view for writing where the tile's rows are a range."""
        return x[_where(tile, tile.rows)]

    def keys(self, x: Tensor, tile: Tile) -> Tensor:
        """(B, Hkv, S, X) → (b, hkv, Sb, X)."""
        return x[_where(tile, tile.columns, self.group)]

    def allowed(self, tile: Tile) -> Tensor | None:
        """Return the tile's mask joined with that of the caller, broadcastable to (b, h, Lb, Sb)."""
        if self.attn_mask is None:
            return tile.mask
        mask = self.attn_mask
        for axis, at in enumerate(_where(tile, tile.rows)):
            mask = mask[(slice(None),) * axis + (at,)] if mask.shape[axis] > 1 else mask
        mask = mask[..., _where(tile, tile.columns)[2]] if mask.shape[3] > 1 else mask
        return mask if tile.mask is None else mask & tile.mask

    def fused(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> Tensor:
        """(b, h, Lb, Dv): a tile's output, by PyTorch's fused kernel."""
        q, k, v = self.queries(query, tile), self.keys(key, tile), self.keys(value, tile)
        mask, empty = self.allowed(tile), None
        if self.attn_mask is not None:
            empty = ~mask.any(-1, keepdim=True)  # such a row attends to everything, and is zeroed afterwards
            mask = mask | empty
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=tile.is_causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return output if empty is None else output.masked_fill_(empty, 0.0)

    def stack(self, x: Tensor, kv_heads: int) -> Tensor:
        """(b, h, Lb, X) → (b·hkv, G·Lb, X): the heads that share keys enter one product."""
        return x.reshape(x.shape[0] * kv_heads, -1, x.shape[-1])

    def weights(self, q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return the weights (b·hkv, G·Lb, Sb) and the logarithms of the rows' sums of exp(score), −∞ where empty."""
        batch, kv_heads, columns = k.shape[:3]
        stacked = self.stack(q, kv_heads)
        s = torch.baddbmm(q.new_empty(()), stacked, k.flatten(0, 1).transpose(1, 2), beta=0, alpha=self.scale)
        if (mask := self.allowed(tile)) is not None:
            s.view(batch, q.shape[1], -1, columns).masked_fill_(~mask, -math.inf)
        top = s.amax(-1, keepdim=True)
        if self.attn_mask is not None:
            top.masked_fill_(top == -math.inf, 0.0)  # an empty row: exp(−∞ − 0) = 0, not NaN
        p = s.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        log_sum = total.log() + top
        return p.div_(total if self.attn_mask is None else total.where(total > 0, 1.0)), log_sum


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask, tiles, scale, with_log_sum):
        pattern = _Pattern(query, key, tiles, attn_mask, scale)
        log_sum = None
        if with_log_sum:
            query, key, value = (x.to(working_type(x)) for x in (query, key, value))
            log_sum = query.new_full((*query.shape[:3], 1), -math.inf)
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        # The fused kernel never holds a tile's scores; where it cannot serve, PyTorch computes them as they are.
        whole = query.shape[3] == value.shape[3] and all(x.stride(3) == 1 for x in (query, key, value))
        for tile in tiles:
            square = len(tile.rows) == len(tile.columns)  # PyTorch's causal flag aligns the starts
            kept = whole and not with_log_sum and not (tile.is_causal and (attn_mask is not None or not square))
            for piece in (tile,) if kept else tile.pieces(query.device):
                at = _where(piece, piece.rows)
                if log_sum is None:
                    output[at] = pattern.fused(query, key, value, piece)
                    continue
                k = pattern.keys(key, piece)
                p, sums = pattern.weights(pattern.queries(query, piece), k, piece)
                mixed = torch.bmm(p, pattern.keys(value, piece).flatten(0, 1))
                output[at] = mixed.view(output[at].shape)
                log_sum[at] = sums.view(log_sum[at].shape)
        ctx.save_for_backward(query, key, value, attn_mask, output)
        ctx.tiles, ctx.scale = tiles, scale
        return output, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_log_sum):
        *inputs, attn_mask, output = ctx.saved_tensors
        query, key, value = (x.to(working_type(x)).contiguous() for x in inputs)
        pattern = _Pattern(query, key, ctx.tiles, attn_mask, ctx.scale)
        grad_output = grad_output.to(query.dtype).contiguous()
        # With P the weights, G the output's gradient and g that of the logarithm of the sum:
        # dV = PᵀG; dZ = P ∘ (G Vᵀ − δ), δ = rowsum(G ∘ O) − g; dQ = dZ K · scale; dK = dZᵀ Q · scale.
        delta = (grad_output * output).sum(-1, keepdim=True)
        if grad_log_sum is not None:
            delta -= grad_log_sum
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for tile in ctx.tiles:
            for piece in tile.pieces(query.device):
                k, v = pattern.keys(key, piece), pattern.keys(value, piece)
                p, _ = pattern.weights(pattern.queries(query, piece), k, piece)  # computed again, not stored
                q, go, d = (pattern.stack(pattern.queries(x, piece), k.shape[1]) for x in (query, grad_output, delta))
                at = _where(piece, piece.columns, pattern.group)
                grad_value[at] += torch.bmm(p.transpose(1, 2), go).view_as(v)
                dz = torch.bmm(go, v.flatten(0, 1).transpose(1, 2)).sub_(d).mul_(p).mul_(ctx.scale)
                rows = _where(piece, piece.rows)
                grad_query[rows] = torch.bmm(dz, k.flatten(0, 1)).view(grad_query[rows].shape)
                grad_key[at] += torch.bmm(dz.transpose(1, 2), q).view_as(k)
        grads = (g.to(x.dtype) for g, x in zip((grad_query, grad_key, grad_value), inputs, strict=True))
        return *grads, None, None, None, None


def attend_in_tiles(
    query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], *, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Compute softmax attention over the pairs that the tiles allow; arguments are taken to be checked.

    Forward by PyTorch's fused kernel, tile by tile; backward written out, from weights computed a second time.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        tiles: what each query may see; queries in no tile get zeros.
        attn_mask: (B or 1, H or 1, L or 1, S or 1) bool, which takes further pairs away; None takes none.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Cost: time in proportion to the pairs in the tiles, O(L + S) memory beyond inputs and output.
    """
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    return _Tiles.apply(query, key, value, attn_mask, tiles, scale, False)[0]


def attend_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Sequence[Sequence[Tile]],
    *,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Compute softmax attention over the pairs of several patterns that have no pair in common.

    For patterns which together have no small tiles: each part is normalised alone, then all are mixed in proportion
    to their sums of exp(score), as the blocks of online softmax are ({cite}`milakov2018`).

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        parts: the tiles of each pattern.
        attn_mask: as for :func:`attend_in_tiles`.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Cost: as for :func:`attend_in_tiles`.
    """
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    found = [_Tiles.apply(query, key, value, attn_mask, tiles, scale, True) for tiles in parts]
    log_sums = torch.stack([log_sum for _, log_sum in found])  # (parts, B, H, L, 1)
    empty = (log_sums == -math.inf).all(0)
    shares = torch.softmax(log_sums.masked_fill(empty, 0.0), 0)  # an empty row: equal shares of zeros
    return sum(share * output for share, (output, _) in zip(shares, found, strict=True)).to(query.dtype)
