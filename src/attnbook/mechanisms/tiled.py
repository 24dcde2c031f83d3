"""Exact attention in tiles, without ever building the L × S matrix (FlashAttention's algorithm in plain PyTorch)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.mechanisms.online_softmax import OnlineSoftmax
from attnbook.shapes import check_attention, check_bias, check_count, check_mask, check_no_nan

# In what follows the H / Hkv query heads that share one key–value head are stacked: their rows enter one matrix
# product.   q  (B·Hkv, G·Lb, D)   a block of Lb queries of all G = H / Hkv heads of a group
#   k  (B·Hkv, Sb, D)     v  (B·Hkv, Sb, Dv)     a block of Sb keys and values
#   s  (B·Hkv, G·Lb, Sb)  its scores: the only tensor with a query axis and a key axis, and it is one tile large


class _Tiles:
    """The geometry of one call: which tiles there are, and views of the operands for each."""

    def __init__(
        self, query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool, size: int
    ):
        self.B, self.H, self.L, self.D = query.shape
        self.Hkv, self.S = key.shape[1:3]
        self.G = self.H // self.Hkv
        self.mask, self.bias, self.is_causal, self.size = mask, bias, is_causal, size
        self.work = (
            torch.float64 if query.dtype == torch.float64 else torch.float32
        )  # half precision is summed in float32

    def queries(self) -> Iterator[slice]:
        return (slice(i, min(i + self.size, self.L)) for i in range(0, self.L, self.size))

    def keys(self, rows: slice) -> Iterator[slice]:
        """Yield the blocks of keys that some query of these rows may see."""
        end = min(self.S, rows.stop + self.S - self.L) if self.is_causal else self.S
        return (slice(j, min(j + self.size, end)) for j in range(0, end, self.size))

    def stack(self, x: Tensor, rows: slice) -> Tensor:
        """(B, H, L, X) → (B·Hkv, G·Lb, X), in the working type."""
        return x[:, :, rows].reshape(self.B * self.Hkv, -1, x.shape[-1]).to(self.work)

    def unstack(self, x: Tensor) -> Tensor:
        """(B·Hkv, G·Lb, X) → (B, H, Lb, X)."""
        return x.view(self.B, self.H, -1, x.shape[-1])

    def shared(self, x: Tensor, columns: slice) -> Tensor:
        """(B, Hkv, S, X) → (B·Hkv, Sb, X), in the working type."""
        return x[:, :, columns].reshape(self.B * self.Hkv, -1, x.shape[-1]).to(self.work)

    def _cut(self, x: Tensor, rows: slice, columns: slice) -> Tensor:
        """Cut a tile out of a tensor that broadcasts to (B, H, L, S), without enlarging its axes of size 1."""
        return x[:, :, rows if x.shape[2] > 1 else slice(None), columns if x.shape[3] > 1 else slice(None)]

    def scores(self, q: Tensor, k: Tensor, rows: slice, columns: slice, scale: float) -> Tensor:
        """(B·Hkv, G·Lb, Sb): scaled, biased, and −∞ where attention is not allowed."""
        s = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        tile = self.unstack(s)  # (B, H, Lb, Sb), the same storage
        if self.bias is not None:
            tile += self._cut(self.bias, rows, columns)
        if self.mask is not None:
            tile.masked_fill_(~self._cut(self.mask, rows, columns), -math.inf)
        offset = self.S - self.L
        if self.is_causal and columns.stop - 1 > rows.start + offset:  # the tile crosses the diagonal
            i = torch.arange(rows.start, rows.stop, device=s.device)[:, None] + offset
            tile.masked_fill_(torch.arange(columns.start, columns.stop, device=s.device) > i, -math.inf)
        return s

    def add_to_bias_gradient(self, total: Tensor, ds: Tensor, rows: slice, columns: slice) -> None:
        """Add a tile's gradient to that of the bias, summed over the axes along which the bias was repeated."""
        part = self._cut(total, rows, columns)
        part += self.unstack(ds).sum_to_size(part.shape)


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    block_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Attend to some of the keys, and keep what is needed to join the result with that over the others.

    Arguments are taken to be checked; nothing is recorded for the backward pass, which is :func:`partial_gradients`.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        mask: broadcastable to (B, H, L, S), bool.
        bias: broadcastable to (B, H, L, S).
        is_causal: let each query see its own position and earlier ones, ends aligned.
        scale: factor of the scores.
        block_size: rows and columns of a tile.
    Returns:
        Output (B, H, L, Dv) over these keys, and log Σ exp(score) of them (B, H, L, 1), −∞ in a row that saw none; both
        in float32, or in float64 where the query is.
    """
    tiles = _Tiles(query, key, mask, bias, is_causal, block_size)
    output = torch.empty(*query.shape[:3], value.shape[3], dtype=tiles.work, device=query.device)
    log_sums = torch.empty(tiles.B, tiles.H, tiles.L, 1, dtype=tiles.work, device=query.device)
    for rows in tiles.queries():
        q = tiles.stack(query, rows)
        state = OnlineSoftmax.empty(q, value.shape[3])
        for columns in tiles.keys(rows):
            s = tiles.scores(q, tiles.shared(key, columns), rows, columns, scale)
            state.absorb(s, tiles.shared(value, columns))
        output[:, :, rows] = tiles.unstack(state.output())
        log_sums[:, :, rows] = tiles.unstack(state.log_sum())
    return output, log_sums


def partial_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    grad_output: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    block_size: int = 256,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute what some of the keys contribute to the gradients of attention over all of them.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        output: (B, H, L, Dv), over all keys.
        log_sums: (B, H, L, 1), over all keys.
        grad_output: (B, H, L, Dv), the gradient of the output.
        mask: as in the forward pass.
        bias: as in the forward pass.
        is_causal: as in the forward pass.
        scale: as in the forward pass.
        block_size: rows and columns of a tile.
        need_bias: compute the gradient of the bias too.
    Returns:
        Gradients of query (its part from these keys), key, value, and bias or None; in float32, or in float64 where the
        query is.
    """
    tiles = _Tiles(query, key, mask, bias, is_causal, block_size)
    grad_query = torch.empty_like(query, dtype=tiles.work)
    grad_key = torch.zeros(tiles.B * tiles.Hkv, tiles.S, tiles.D, dtype=tiles.work, device=key.device)
    grad_value = torch.zeros(*grad_key.shape[:2], value.shape[3], dtype=tiles.work, device=key.device)
    grad_bias = torch.zeros_like(bias, dtype=tiles.work) if need_bias else None
    for rows in tiles.queries():
        q, go, o, lse = (tiles.stack(x, rows) for x in (query, grad_output, output, log_sums))
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # an empty row: exp(−∞ − 0) = 0, not NaN
        delta = (go * o).sum(-1, keepdim=True)  # rowsum(P ∘ dP), got from the output alone
        dq = torch.zeros_like(q)
        for columns in tiles.keys(rows):
            k, v = tiles.shared(key, columns), tiles.shared(value, columns)
            p = tiles.scores(q, k, rows, columns, scale).sub_(lse).exp_()  # recomputed, not stored
            grad_value[:, columns].baddbmm_(p.transpose(1, 2), go)
            ds = torch.bmm(go, v.transpose(1, 2)).sub_(delta).mul_(p)
            dq.baddbmm_(ds, k, alpha=scale)
            grad_key[:, columns].baddbmm_(ds.transpose(1, 2), q, alpha=scale)
            if grad_bias is not None:
                tiles.add_to_bias_gradient(grad_bias, ds, rows, columns)
        grad_query[:, :, rows] = tiles.unstack(dq)
    return grad_query, grad_key.view(key.shape), grad_value.view(value.shape), grad_bias


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, bias, is_causal, scale, size):
        ctx.options = {"is_causal": is_causal, "scale": scale, "block_size": size}
        output, log_sums = partial_attention(query, key, value, mask=mask, bias=bias, **ctx.options)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, bias, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, mask, bias, output, log_sums = ctx.saved_tensors
        gradients = partial_gradients(
            query,
            key,
            value,
            output,
            log_sums,
            grad_output,
            mask=mask,
            bias=bias,
            need_bias=ctx.needs_input_grad[4],
            **ctx.options,
        )
        types = query.dtype, key.dtype, value.dtype, None if bias is None else bias.dtype
        dq, dk, dv, db = (g if g is None else g.to(t) for g, t in zip(gradients, types, strict=True))
        return dq, dk, dv, None, db, None, None, None


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 256,
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
        block_size: rows and columns of a tile.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once in query, key, value and bias.
    Raises:
        ValueError: shapes, types or a block size that do not fit; NaN in query, key or bias.
    Cost: O(LSD) time, O(L + S) memory beyond inputs and output; the backward pass computes the scores a second time.
    """
    shape = check_attention(query, key, value)
    check_count("block_size", block_size)
    check_no_nan("query", query)
    check_no_nan("key", key)
    target = (shape.B, shape.H, shape.L, shape.S)
    if attn_mask is not None:
        attn_mask = check_mask("attn_mask", attn_mask, target)
    if bias is not None:
        bias = check_bias("bias", bias, target)
    scale = shape.D**-0.5 if scale is None else float(scale)
    return _Tiled.apply(query, key, value, attn_mask, bias, is_causal, scale, block_size)
