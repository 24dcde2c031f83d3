"""Attention on a machine with two memories: what moves between them, counted by execution and by formula.

Three ways: with the whole matrix in the slow memory, and in tiles with either order of the loops. One head, no mask.
The machine is :class:`attnbook.analysis.two_level.TwoLevelMemory`. Chapter: {ref}`sec-15-flash`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.analysis.two_level import Fast, Slow, TwoLevelMemory
from attnbook.shapes import check_count, mismatch

Array = NDArray[np.float64]


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _add_product(total: Fast, a: Fast, b: Fast, column: Fast) -> None:
    """Add a @ b to total, a column at a time, so that a single column is all the room it takes."""
    total, a, b, column = (x.view(np.ndarray) for x in (total, a, b, column))  # every result has its place: be quick
    for j in range(total.shape[1]):
        np.matmul(a, b[:, j], out=column)
        total[:, j] += column


def _absorb(s: Fast, top: Fast, total: Fast, new: Fast, part: Fast) -> None:
    """Turn scores into weights relative to the largest so far, and bring top and total up to date.

    Afterwards ``new`` holds the factor by which everything older has to shrink.
    """
    np.maximum.reduce(s, axis=1, out=new)
    np.maximum(new, top, out=new)
    s -= new[:, None]
    np.exp(s, out=s)
    np.add.reduce(s, axis=1, out=part)
    top -= new
    np.exp(top, out=top)
    total *= top
    total += part
    part[...], top[...] = top, new
    new[...] = part


def naive_tile(capacity: int) -> int:
    """Return the side t of the largest square tile for :func:`naive`: 3t² + t numbers have to fit.

    Args:
        capacity: M, of the fast memory.
    Raises:
        ValueError: a capacity below 14, with which t would be 1 and the softmax would not fit.
    """
    if check_count("capacity", capacity) < 14:
        raise mismatch("capacity", "an integer ≥ 14", capacity)
    return (math.isqrt(12 * capacity + 1) - 1) // 6  # 3t² + t ≤ M  ⟺  (6t + 1)² ≤ 12M + 1


def naive_count(L: int, S: int, D: int, Dv: int, *, tile: int) -> int:
    """Return what :func:`naive` moves: LD⌈S/t⌉ + SD⌈L/t⌉ + LS for scores, 3LS, LS⌈Dv/t⌉ + SDv⌈L/t⌉ + LDv.

    Args:
        L: queries.
        S: keys.
        D: size of a query and key.
        Dv: size of a value.
        tile: t, the side of a tile.
    Returns:
        Numbers loaded and stored.
    """
    down, across, wide = (math.ceil(length / tile) for length in (L, S, Dv))
    return L * D * across + S * D * down + L * S + 3 * L * S + L * S * wide + S * Dv * down + L * Dv


def by_queries_block(capacity: int, D: int, Dv: int, inner: int = 1) -> int:
    """Return the most queries a block may have in :func:`by_queries`.

    They, their outputs, four numbers for each and the tile have to fit beside the inner keys and values.

    Args:
        capacity: M, of the fast memory.
        D: size of a query and key.
        Dv: size of a value.
        inner: keys in a block.
    Raises:
        ValueError: there is no room for one.
    """
    block = (check_count("capacity", capacity) - check_count("inner", inner) * (D + Dv)) // (D + Dv + 4 + inner)
    if block < 1:
        raise mismatch("capacity", f"an integer ≥ {inner * (D + Dv) + D + Dv + 4 + inner}", capacity)
    return block


def by_queries_count(L: int, S: int, D: int, Dv: int, *, outer: int) -> int:
    """Return what :func:`by_queries` moves: L(D + Dv) + ⌈L/r⌉ S (D + Dv).

    Args:
        L: queries.
        S: keys.
        D: size of a query and key.
        Dv: size of a value.
        outer: r, queries in a block.
    Returns:
        Numbers loaded and stored.
    """
    return L * (D + Dv) + math.ceil(L / outer) * S * (D + Dv)


def by_keys_block(capacity: int, D: int, Dv: int, inner: int = 1) -> int:
    """Return the most keys a block may have in :func:`by_keys`.

    They and their values have to fit beside the inner queries, outputs, four numbers for each, and the tile.

    Args:
        capacity: M, of the fast memory.
        D: size of a query and key.
        Dv: size of a value.
        inner: queries in a block.
    Raises:
        ValueError: there is no room for one.
    """
    block = (check_count("capacity", capacity) - check_count("inner", inner) * (D + Dv + 4)) // (D + Dv + inner)
    if block < 1:
        raise mismatch("capacity", f"an integer ≥ {inner * (D + Dv + 4) + D + Dv + inner}", capacity)
    return block


def by_keys_count(L: int, S: int, D: int, Dv: int, *, outer: int) -> int:
    """Return what :func:`by_keys` moves: S(D + Dv) + L(Dv + 2) + ⌈S/c⌉ L (D + 2Dv + 4).

    Args:
        L: queries.
        S: keys.
        D: size of a query and key.
        Dv: size of a value.
        outer: c, keys in a block.
    Returns:
        Numbers loaded and stored.
    """
    return S * (D + Dv) + L * (Dv + 2) + math.ceil(S / outer) * L * (D + 2 * Dv + 4)


@dataclass(frozen=True)
class Traffic:
    """What an execution gave and what it moved.

    Attributes:
        output: (L, Dv).
        loaded: numbers moved from slow to fast memory.
        stored: numbers moved from fast to slow memory.
        most: the most numbers that the fast memory held at once.
    """

    output: Array
    loaded: int
    stored: int
    most: int

    @property
    def moved(self) -> int:
        """Loaded and stored together."""
        return self.loaded + self.stored


def _slow(query: ArrayLike, key: ArrayLike, value: ArrayLike) -> tuple[Slow, Slow, Slow, Slow]:
    """Put the operands, and room for the output, into the slow memory."""
    q, k, v = Slow(query), Slow(key), Slow(value)
    for name, x in (("query", q), ("key", k), ("value", v)):
        if len(x.shape) != 2 or 0 in x.shape:
            raise mismatch(name, "two axes, none of them empty", f"shape {x.shape}")
    if k.shape[1] != q.shape[1]:
        raise mismatch("key", f"last axis D = {q.shape[1]}, that of query", f"shape {k.shape}")
    if v.shape[0] != k.shape[0]:
        raise mismatch("value", f"first axis S = {k.shape[0]}, that of key", f"shape {v.shape}")
    return q, k, v, Slow(np.zeros((q.shape[0], v.shape[1])))


def _finished(memory: TwoLevelMemory, o: Slow) -> Traffic:
    return Traffic(o._array, memory.loaded, memory.stored, memory.most)


def naive(query: ArrayLike, key: ArrayLike, value: ArrayLike, *, capacity: int, tile: int | None = None) -> Traffic:
    """Execute attention as it is written: scores, softmax and mixing one after another, the matrix in slow memory.

    Both matrix products go by square tiles, which is the cheapest way there is for them up to a constant
    ({cite}`hong1981`); the softmax reads every row twice, which is the fewest where a row does not fit.

    Args:
        query: (L, D).
        key: (S, D).
        value: (S, Dv).
        capacity: M, of the fast memory.
        tile: side of a tile; the largest that fits by default.
    Returns:
        Output and traffic; the latter equals :func:`naive_count`.
    Raises:
        ValueError: shapes that do not fit, or a capacity below 14.
        FastMemoryFull: the tile is too large.
    """
    q, k, v, o = _slow(query, key, value)
    (L, D), S, Dv = q.shape, k.shape[0], v.shape[1]
    t = naive_tile(capacity) if tile is None else check_count("tile", tile)
    memory, z = TwoLevelMemory(capacity), Slow(np.zeros((L, S)))
    for rows in _blocks(L, t):
        for columns in _blocks(S, t):
            with memory.frame():
                s = memory.new(rows.stop - rows.start, columns.stop - columns.start)
                for inner in _blocks(D, t):
                    with memory.frame():
                        a, b = memory.load(q, rows, inner), memory.load(k, columns, inner)
                        _add_product(s, a, b.T, memory.new(s.shape[0]))
                s *= 1 / math.sqrt(D)
                memory.store(s, z, rows, columns)
    for rows in _blocks(L, t):
        with memory.frame():
            top, total, new, part = (memory.new(rows.stop - rows.start, fill=x) for x in (-math.inf, 0, 0, 0))
            for columns in _blocks(S, t):
                with memory.frame():
                    _absorb(memory.load(z, rows, columns), top, total, new, part)
            for columns in _blocks(S, t):
                with memory.frame():
                    s = memory.load(z, rows, columns)
                    s -= top[:, None]
                    np.exp(s, out=s)
                    s /= total[:, None]
                    memory.store(s, z, rows, columns)
    for rows in _blocks(L, t):
        for inner in _blocks(Dv, t):
            with memory.frame():
                mix = memory.new(rows.stop - rows.start, inner.stop - inner.start)
                for columns in _blocks(S, t):
                    with memory.frame():
                        a, b = memory.load(z, rows, columns), memory.load(v, columns, inner)
                        _add_product(mix, a, b, memory.new(mix.shape[0]))
                memory.store(mix, o, rows, inner)
    return _finished(memory, o)


def by_queries(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, capacity: int, outer: int | None = None, inner: int = 1
) -> Traffic:
    """Execute attention in tiles, the outer loop over blocks of queries ({cite}`dao2024`, algorithm 1).

    Args:
        query: (L, D).
        key: (S, D).
        value: (S, Dv).
        capacity: M, of the fast memory.
        outer: queries in a block; the most that fit by default.
        inner: keys in a block. It does not change the traffic, only the room that is left for queries.
    Returns:
        Output and traffic; the latter equals :func:`by_queries_count`.
    Raises:
        ValueError: shapes that do not fit, or a capacity without room for a single query.
        FastMemoryFull: the blocks are too large.
    """
    q, k, v, o = _slow(query, key, value)
    (L, D), S, Dv = q.shape, k.shape[0], v.shape[1]
    outer = by_queries_block(capacity, D, Dv, inner) if outer is None else check_count("outer", outer)
    memory = TwoLevelMemory(capacity)
    for rows in _blocks(L, outer):
        with memory.frame():
            n = rows.stop - rows.start
            a, mix = memory.load(q, rows), memory.new(n, Dv)
            a *= 1 / math.sqrt(D)
            top, total, new, part = (memory.new(n, fill=x) for x in (-math.inf, 0, 0, 0))
            for columns in _blocks(S, check_count("inner", inner)):
                with memory.frame():
                    b, c = memory.load(k, columns), memory.load(v, columns)
                    s = memory.new(n, columns.stop - columns.start)
                    np.matmul(a, b.T, out=s)
                    _absorb(s, top, total, new, part)
                    mix *= new[:, None]
                    _add_product(mix, s, c, part)
            mix /= total[:, None]
            memory.store(mix, o, rows)
    return _finished(memory, o)


def by_keys(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, capacity: int, outer: int | None = None, inner: int = 1
) -> Traffic:
    """Execute attention in tiles, the outer loop over blocks of keys ({cite}`dao2022`, algorithm 1).

    Outputs, sums and largest scores wait in the slow memory between two blocks of keys.

    Args:
        query: (L, D).
        key: (S, D).
        value: (S, Dv).
        capacity: M, of the fast memory.
        outer: keys in a block; the most that fit by default.
        inner: queries in a block. It does not change the traffic, only the room that is left for keys.
    Returns:
        Output and traffic; the latter equals :func:`by_keys_count`.
    Raises:
        ValueError: shapes that do not fit, or a capacity without room for a single key.
        FastMemoryFull: the blocks are too large.
    """
    q, k, v, o = _slow(query, key, value)
    (L, D), S, Dv = q.shape, k.shape[0], v.shape[1]
    outer = by_keys_block(capacity, D, Dv, inner) if outer is None else check_count("outer", outer)
    memory, tops, totals = TwoLevelMemory(capacity), Slow(np.zeros(L)), Slow(np.zeros(L))
    queries = _blocks(L, check_count("inner", inner))
    for rows in queries:  # nothing seen yet
        for array, fill in ((o, 0.0), (totals, 0.0), (tops, -math.inf)):
            with memory.frame():
                memory.store(memory.new(rows.stop - rows.start, *array.shape[1:], fill=fill), array, rows)
    for columns in _blocks(S, outer):
        with memory.frame():
            b, c = memory.load(k, columns), memory.load(v, columns)
            for rows in queries:
                with memory.frame():
                    a, mix, total, top = (memory.load(x, rows) for x in (q, o, totals, tops))
                    s, new, part = memory.new(len(a), len(b)), memory.new(len(a)), memory.new(len(a))
                    a *= 1 / math.sqrt(D)
                    np.matmul(a, b.T, out=s)
                    mix *= total[:, None]
                    _absorb(s, top, total, new, part)
                    mix *= new[:, None]
                    _add_product(mix, s, c, part)
                    mix /= total[:, None]
                    for array, target in ((mix, o), (total, totals), (top, tops)):
                        memory.store(array, target, rows)
    return _finished(memory, o)
