"""The plainest cache: room for every position, set aside beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.cache.base import Cache


class StaticCache(Cache):
    """Keys and values of one attention layer, in memory set aside beforehand.

    Args:
        batch_size: B.
        num_kv_heads: Hkv.
        max_length: how many positions there is room for.
        head_dim: D.
        value_dim: Dv; D by default.
        dtype: element type.
        device: where to keep it.
    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__(batch_size, num_kv_heads, max_length, head_dim, value_dim)
        shape = (batch_size, num_kv_heads, max_length)
        self.keys = torch.zeros(*shape, self.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, self.value_dim, dtype=dtype, device=device)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Do what ``update`` does, the arguments taken to be checked; what comes back are views.

        Args:
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
        """
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, index: Tensor) -> None:
        """Rearrange the batch, as beam search does: sequence b continues what was sequence ``index[b]``.

        Args:
            index: (B,) integers.
        Raises:
            ValueError: another length, or an index out of range.
        """
        self.check_index(index)
        self.keys[:, :, : self.length] = self.keys[index, :, : self.length]
        self.values[:, :, : self.length] = self.values[index, :, : self.length]

    def nbytes(self) -> int:
        """Return the memory set aside, in bytes."""
        return self.keys.nbytes + self.values.nbytes
