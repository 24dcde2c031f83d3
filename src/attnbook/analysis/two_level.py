"""A machine with two memories, a fast small one and a slow large one, that counts what moves between them.

The model is that of {cite}`hong1981`: arithmetic is free, and happens in the fast memory only. Chapter:
{ref}`sec-15-flash`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attnbook.shapes import check_count


class FastMemoryFull(RuntimeError):
    """Something was to be kept in the fast memory for which it has no room."""


class Slow:
    """An array in the slow memory: it can be loaded and stored to, and nothing else can be done with it.

    Args:
        array: its content; copied.

    Attributes:
        shape: of the array.
    """

    def __init__(self, array: ArrayLike):
        self._array = np.array(array, dtype=np.float64)
        self.shape = self._array.shape


class Fast(np.ndarray):
    """An array in the fast memory. An operation on it has to say where its result goes (``out=``, or in place)."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        """Compute, unless the result would need memory that nobody asked for."""
        if out is None:
            raise TypeError(f"{ufunc.__name__}: its result needs a place in the fast memory; pass out=")
        bare = [x.view(np.ndarray) if isinstance(x, Fast) else x for x in (*inputs, *out)]
        getattr(ufunc, method)(*bare[: len(inputs)], out=tuple(bare[len(inputs) :]), **options)
        return out[0]


class TwoLevelMemory:
    """A fast memory of a fixed number of numbers, beside a slow one without limit.

    Attributes:
        capacity: M, how many numbers the fast memory holds.
        used: how many it holds now.
        most: the most it held so far.
        loaded: numbers moved from slow to fast so far.
        stored: numbers moved from fast to slow so far.
    """

    def __init__(self, capacity: int):
        self.capacity = check_count("capacity", capacity)
        self.used = self.most = self.loaded = self.stored = 0
        self._frames: list[list[Fast]] = [[]]

    def new(self, *shape: int, fill: float = 0.0) -> Fast:
        """Take fast memory for an array.

        Args:
            fill: the array's content.
            shape: of the array.
        Returns:
            The array; it is given back at the end of the frame in which it was made.
        Raises:
            FastMemoryFull: there is no room for it.
        """
        size = math.prod(shape)
        if self.used + size > self.capacity:
            raise FastMemoryFull(f"{size} numbers more than the {self.used} of {self.capacity} that are in use")
        self.used += size
        self.most = max(self.most, self.used)
        array = np.full(shape, fill, dtype=np.float64).view(Fast)
        self._frames[-1].append(array)
        return array

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Give back, at the end of a ``with`` block, the fast memory taken in it; what was there becomes NaN."""
        self._frames.append([])
        try:
            yield
        finally:
            for array in self._frames.pop():
                self.used -= array.size
                array[...] = np.nan

    def load(self, source: Slow, *place: slice) -> Fast:
        """Copy a part of a slow array into new fast memory.

        Args:
            source: the slow array.
            place: which part, a slice for each of its first axes.
        Returns:
            The copy.
        Raises:
            FastMemoryFull: there is no room for it.
        """
        part = source._array[place]
        array = self.new(*part.shape)
        array[...] = part
        self.loaded += part.size
        return array

    def store(self, array: Fast, target: Slow, *place: slice) -> None:
        """Copy an array to a place in a slow one.

        Args:
            array: of the fast memory.
            target: the slow array.
            place: where to, a slice for each of its first axes.
        """
        target._array[place] = array
        self.stored += array.size
