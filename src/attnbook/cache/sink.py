"""A cache of constant size: the first positions and the latest, for texts without end."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.cache.static import StaticCache
from attnbook.positions import RotaryEmbedding
from attnbook.shapes import check_count, mismatch


class SinkCache(StaticCache):
    """Keys and values of the first ``sinks`` positions and of the last ``max_length − sinks`` ({cite}`xiao2024`, §3.2).

    With no sinks it is a sliding window. Positions count within the cache: dropping the oldest of the window brings the
    sinks one position nearer. Scores under rotary positions depend on distances alone, so the keys of the window stay
    as they are, and those of the sinks are turned by as many positions as were dropped.

    While nothing has been dropped, several positions may be appended at once; afterwards one at a time, and what comes
    back is not in the order of time, which attention from one position does not see.

    Args:
        batch_size: B.
        num_kv_heads: Hkv.
        max_length: how many positions to keep, sinks included.
        head_dim: D.
        value_dim: Dv; D by default.
        sinks: how many of the first positions to keep; the paper takes 4.
        rotary: what has turned the keys; None where the model has no positions.
        dtype: element type.
        device: where to keep it.
    Raises:
        ValueError: a size below 1, or no room beside the sinks.
    """

    rolling = True

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        sinks: int = 4,
        rotary: RotaryEmbedding | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        options = {"value_dim": value_dim, "dtype": dtype, "device": device}
        super().__init__(batch_size, num_kv_heads, max_length, head_dim, **options)
        self.sinks, self.rotary = check_count("sinks", sinks, least=0), rotary
        if sinks >= max_length:
            raise mismatch("max_length", f"an integer > sinks = {sinks}", max_length)
        self.first = None  # the sinks' keys as they came, once something is dropped

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Do what ``update`` does, the arguments taken to be checked; what comes back are views.

        Args:
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
        Raises:
            ValueError: several positions, of which some would drop others.
        """
        if self.length + key.shape[2] <= self.max_length:
            return super().append(key, value)
        if key.shape[2] > 1:
            room = max(self.max_length - self.length, 1)
            raise mismatch("key", f"at most {room} more positions at once", f"{key.shape[2]}")
        if self.first is None:
            self.first = self.keys[:, :, : self.sinks].clone()
        place = self.sinks + (self.length - self.sinks) % (self.max_length - self.sinks)  # where the oldest lies
        self.keys[:, :, place : place + 1] = key
        self.values[:, :, place : place + 1] = value
        self.length += 1
        if self.sinks and self.rotary is not None:
            dropped = torch.full((self.sinks,), self.length - self.max_length, device=key.device)
            self.keys[:, :, : self.sinks] = self.rotary(self.first, dropped)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all positions; the memory stays."""
        super().reset()
        self.first = None

    def reorder(self, index: Tensor) -> None:
        """Rearrange the batch: sequence b continues what was sequence ``index[b]``.

        Args:
            index: (B,) integers.
        Raises:
            ValueError: another length, or an index out of range.
        """
        super().reorder(index)
        self.first = None if self.first is None else self.first[index]
