"""What all caches have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.shapes import check_count, check_tensor, mismatch


class Cache:
    """Keys and values of one attention layer; the kinds differ in where they keep them, and for how long.

    Args:
        batch_size: B.
        num_kv_heads: Hkv.
        max_length: how many positions there is room for.
        head_dim: D.
        value_dim: Dv; D by default.
    Raises:
        ValueError: a size below 1.
    """

    rolling = False  # whether old positions make room for new ones

    def __init__(
        self, batch_size: int, num_kv_heads: int, max_length: int, head_dim: int, value_dim: int | None = None
    ):
        self.batch_size = check_count("batch_size", batch_size)
        self.num_kv_heads = check_count("num_kv_heads", num_kv_heads)
        self.max_length = check_count("max_length", max_length)
        self.head_dim = check_count("head_dim", head_dim)
        self.value_dim = head_dim if value_dim is None else check_count("value_dim", value_dim)
        self.length = 0  # positions seen so far

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions and return all that are kept.

        Args:
            key: (B, Hkv, L, D), the keys of L new positions.
            value: (B, Hkv, L, Dv).
        Returns:
            The keys (B, Hkv, S, D) and values (B, Hkv, S, Dv) of the S positions kept, views where the kind has them in
            one piece.
        Raises:
            ValueError: shapes that do not match the cache, or more positions than there is room for.
        """
        check_tensor("key", key, "B Hkv L D")
        check_tensor("value", value, "B Hkv L Dv")
        for name, new, size in (("key", key, self.head_dim), ("value", value, self.value_dim)):
            wanted = (self.batch_size, self.num_kv_heads, key.shape[2], size)
            if tuple(new.shape) != wanted:
                raise mismatch(name, f"shape {wanted}, to fit the cache", new)
        if self.length + key.shape[2] > self.max_length and not self.rolling:
            raise mismatch("key", f"at most {self.max_length - self.length} more positions", f"{key.shape[2]}")
        return self.append(key, value)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Do what ``update`` does, the arguments taken to be checked.

        Args:
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all positions; the memory stays."""
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget the newest positions, as speculative decoding does with tokens that were not accepted.

        Args:
            length: how many to keep.
        Raises:
            ValueError: more than there are, or fewer than none; old positions that have made room for newer ones.
        """
        if check_count("length", length, least=0) > self.length:
            raise mismatch("length", f"at most {self.length}", length)
        if self.length > self.max_length:
            raise mismatch("length", "a cache that has dropped nothing yet", f"{self.length} positions seen")
        self.length = length

    def check_index(self, index: Tensor) -> list[int]:
        """Check the argument of ``reorder``.

        Args:
            index: (B,) integers in [0, B).
        Returns:
            The integers.
        Raises:
            ValueError: another length, or an index out of range.
        """
        check_tensor("index", index, "B", dtypes=(torch.int64, torch.int32))
        found = index.tolist()
        if len(found) != self.batch_size or min(found) < 0 or max(found) >= self.batch_size:
            raise mismatch("index", f"{self.batch_size} integers in [0, {self.batch_size - 1}]", str(found))
        return found
