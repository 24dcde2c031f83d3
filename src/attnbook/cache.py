"""Key–value caches for decoding one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.shapes import check_count, check_tensor, mismatch


class StaticCache:
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
        for name, size in (("batch_size", batch_size), ("num_kv_heads", num_kv_heads), ("max_length", max_length)):
            check_count(name, size)
        shape = (batch_size, num_kv_heads, max_length)
        self.keys = torch.zeros(*shape, check_count("head_dim", head_dim), dtype=dtype, device=device)
        value_dim = head_dim if value_dim is None else check_count("value_dim", value_dim)
        self.values = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0  # positions filled so far

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions and return all of them.

        Args:
            key: (B, Hkv, L, D), the keys of L new positions.
            value: (B, Hkv, L, Dv).
        Returns:
            Views of the keys (B, Hkv, S, D) and values (B, Hkv, S, Dv) of all S positions so far.
        Raises:
            ValueError: shapes that do not match the cache, or more positions than there is room for.
        """
        check_tensor("key", key, "B Hkv L D")
        check_tensor("value", value, "B Hkv L Dv")
        end = self.length + key.shape[2]
        for name, new, old in (("key", key, self.keys), ("value", value, self.values)):
            wanted = (*old.shape[:2], key.shape[2], old.shape[3])
            if tuple(new.shape) != wanted:
                raise mismatch(name, f"shape {wanted}, to fit the cache", new)
        if end > self.max_length:
            raise mismatch("key", f"at most {self.max_length - self.length} more positions", f"{key.shape[2]}")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reset(self) -> None:
        """Forget all positions; the memory stays."""
        self.length = 0

    def reorder(self, index: Tensor) -> None:
        """Rearrange the batch, as beam search does: sequence b continues what was sequence ``index[b]``.

        Args:
            index: (B,) integers.
        Raises:
            ValueError: another length, or an index out of range.
        """
        check_tensor("index", index, "B", dtypes=(torch.int64, torch.int32))
        if len(index) != len(self.keys) or int(index.min()) < 0 or int(index.max()) >= len(self.keys):
            raise mismatch("index", f"{len(self.keys)} integers in [0, {len(self.keys) - 1}]", str(index.tolist()))
        self.keys[:, :, : self.length] = self.keys[index, :, : self.length]
        self.values[:, :, : self.length] = self.values[index, :, : self.length]

    def nbytes(self) -> int:
        """Return the memory set aside, in bytes."""
        return self.keys.nbytes + self.values.nbytes
