"""A cache in pages: memory is taken as texts grow, and what they have in common is kept once."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.cache.base import Cache
from attnbook.shapes import check_count, check_tensor, mismatch


class PagedCache(Cache):
    """Keys and values of one attention layer, in pages of a fixed size ({cite}`kwon2023`, §4).

    Each sequence has a table of its pages; pages that nobody holds are on one free list. Sequences that continue the
    same text share its pages: a page is copied only when one of its holders is about to write to it.

    Differs from the paper: pages are gathered into one piece for each call of attention, instead of being read where
    they lie by a kernel made for it; and the sequences of a batch have equally many positions.

    Args:
        batch_size: B.
        num_kv_heads: Hkv.
        max_length: how many positions a sequence may have.
        head_dim: D.
        value_dim: Dv; D by default.
        page_size: positions in a page.
        num_pages: how many pages there are; as many as B full sequences need by default.
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
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__(batch_size, num_kv_heads, max_length, head_dim, value_dim)
        self.page_size = check_count("page_size", page_size)
        full = batch_size * -(-max_length // page_size)
        num_pages = full if num_pages is None else check_count("num_pages", num_pages)
        shape = (num_pages, num_kv_heads, page_size)
        self.keys = torch.zeros(*shape, self.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, self.value_dim, dtype=dtype, device=device)
        self.tables: list[list[int]] = [[] for _ in range(batch_size)]
        self.free = list(range(num_pages))[::-1]
        self.holders = [0] * num_pages

    def _let_go(self, page: int) -> None:
        self.holders[page] -= 1
        if not self.holders[page]:
            self.free.append(page)

    def _take(self) -> int:
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def _reserve(self, end: int) -> None:
        """Give every sequence pages up to a position, and a copy of its own of the page that it goes on writing to."""
        wanted, partial = -(-end // self.page_size), self.length % self.page_size
        begun = {}  # pages that are about to be written to, and by how many
        for table in self.tables if partial else ():
            begun[table[-1]] = begun.get(table[-1], 0) + 1
        copies = sum(count - (count == self.holders[page]) for page, count in begun.items())
        needed = copies + sum(wanted - len(table) for table in self.tables)
        if needed > len(self.free):
            raise mismatch("key", f"positions for at most {len(self.free)} more pages", f"positions for {needed}")
        for table in self.tables:
            if partial and self.holders[table[-1]] > 1:
                page = self._take()
                self.keys[page], self.values[page] = self.keys[table[-1]], self.values[table[-1]]
                self._let_go(table[-1])
                table[-1] = page
            table += [self._take() for _ in range(wanted - len(table))]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Do what ``update`` does, the arguments taken to be checked; what comes back are copies.

        Args:
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
        Raises:
            ValueError: fewer pages are free than are needed.
        """
        end = self.length + key.shape[2]
        self._reserve(end)
        tables = torch.tensor(self.tables, device=key.device)  # (B, pages)
        positions = torch.arange(self.length, end, device=key.device)
        pages, places = tables[:, positions // self.page_size], positions % self.page_size  # (B, L), (L,)
        self.keys[pages, :, places] = key.transpose(1, 2)
        self.values[pages, :, places] = value.transpose(1, 2)
        self.length = end
        return self._gather(self.keys, tables), self._gather(self.values, tables)

    def _gather(self, memory: Tensor, tables: Tensor) -> Tensor:
        """Lay a batch's pages one after another: (pages, Hkv, page size, D) → (B, Hkv, S, D)."""
        return memory[tables].transpose(1, 2).flatten(2, 3)[:, :, : self.length]

    def reset(self) -> None:
        """Forget all positions; all pages are free again."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Forget the newest positions; pages that hold no others become free.

        Args:
            length: how many to keep.
        Raises:
            ValueError: more than there are, or fewer than none.
        """
        super().truncate(length)
        for table in self.tables:
            while len(table) > -(-length // self.page_size):
                self._let_go(table.pop())

    def reorder(self, index: Tensor) -> None:
        """Rearrange the batch: sequence b continues what was sequence ``index[b]``, and shares its pages.

        The batch may grow or shrink by it: one prompt, read once, can be continued many times.

        Args:
            index: integers below B, as many as there are to be sequences.
        Raises:
            ValueError: an index out of range.
        """
        check_tensor("index", index, "B", dtypes=(torch.int64, torch.int32))
        chosen = index.tolist()
        if min(chosen) < 0 or max(chosen) >= self.batch_size:
            raise mismatch("index", f"integers in [0, {self.batch_size - 1}]", str(chosen))
        before, self.tables = self.tables, [list(self.tables[b]) for b in chosen]
        for table in self.tables:
            for page in table:
                self.holders[page] += 1
        for table in before:
            for page in table:
                self._let_go(page)
        self.batch_size = len(chosen)

    def nbytes(self, *, held: bool = False) -> int:
        """Return the memory set aside, in bytes.

        Args:
            held: count only the pages that some sequence holds.
        """
        total = self.keys.nbytes + self.values.nbytes
        return total * (len(self.holders) - len(self.free)) // len(self.holders) if held else total
