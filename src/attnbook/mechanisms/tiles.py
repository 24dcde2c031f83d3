"""The geometry of tiles: blocks of the matrix of scores, and the views of queries, keys and values that make them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# In what follows the H / Hkv query heads that share one key–value head are stacked: their rows enter one matrix
# product.   q  (B·Hkv, G·Lb, D)   a block of Lb queries of all G = H / Hkv heads of a group
#   k  (B·Hkv, Sb, D)     v  (B·Hkv, Sb, Dv)     a block of Sb keys and values
#   s  (B·Hkv, G·Lb, Sb)  its scores: the only tensor with a query axis and a key axis, and it is one tile large


class Tiles:
    """The geometry of one call: which tiles there are, and views of the operands for each.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        mask: with four axes, broadcastable to (B, H, L, S), bool; or None.
        bias: with four axes, broadcastable to (B, H, L, S); or None.
        is_causal: whether a query sees no key after its own position, ends aligned.
        size: rows of a tile; columns too, unless a caller takes whole rows.
        work: the type to compute in; by default float32 for half precision, so that it is summed well.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        is_causal: bool,
        size: int,
        work: torch.dtype | None = None,
    ):
        self.B, self.H, self.L, self.D = query.shape
        self.Hkv, self.S = key.shape[1:3]
        self.G = self.H // self.Hkv
        self.mask, self.bias, self.is_causal, self.size = mask, bias, is_causal, size
        self.work = torch.promote_types(query.dtype, torch.float32) if work is None else work

    def queries(self) -> Iterator[slice]:
        """Yield the blocks of queries."""
        return (slice(i, min(i + self.size, self.L)) for i in range(0, self.L, self.size))

    def keys(self, rows: slice) -> Iterator[slice]:
        """Yield the blocks of keys that some query of these rows may see."""
        end = self.end(rows)
        return (slice(j, min(j + self.size, end)) for j in range(0, end, self.size))

    def end(self, rows: slice) -> int:
        """Return how many keys, from the first on, some query of these rows may see."""
        return max(min(self.S, rows.stop + self.S - self.L), 0) if self.is_causal else self.S

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
            first = max(columns.start, rows.start + offset + 1)  # keys before it are seen by all these rows
            i = torch.arange(rows.start + offset, rows.stop + offset, device=s.device)[:, None]
            hidden = torch.arange(first, columns.stop, device=s.device) > i
            tile[..., first - columns.start :].masked_fill_(hidden, -math.inf)
        return s

    def add_to_bias_gradient(self, total: Tensor, ds: Tensor, rows: slice, columns: slice) -> None:
        """Add a tile's gradient to that of the bias, summed over the axes along which the bias was repeated."""
        part = self._cut(total, rows, columns)
        part += self.unstack(ds).sum_to_size(part.shape)
