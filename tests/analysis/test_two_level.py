"""The machine with two memories: it counts what moves, and lets nothing happen outside its account."""

from __future__ import annotations

import numpy as np
import pytest

from attnbook.analysis.two_level import FastMemoryFull, Slow, TwoLevelMemory
from helpers import complains


def test_loads_and_stores_are_counted():
    memory, slow = TwoLevelMemory(100), Slow(np.arange(12.0).reshape(3, 4))
    with memory.frame():
        part = memory.load(slow, slice(0, 2), slice(1, 3))
        assert part.tolist() == [[1, 2], [5, 6]]
        part *= 10
        memory.store(part, slow, slice(1, 3), slice(0, 2))
    assert (memory.loaded, memory.stored, memory.used, memory.most) == (4, 4, 0, 4)
    memory.load(slow)
    assert (memory.loaded, memory.used) == (16, 12)


def test_slow_arrays_are_copies_and_do_not_compute():
    original = np.ones((2, 2))
    slow = Slow(original)
    original[0, 0] = 5
    assert TwoLevelMemory(4).load(slow)[0, 0] == 1
    with pytest.raises(TypeError):
        slow + 1


def test_the_fast_memory_is_never_exceeded():
    memory = TwoLevelMemory(10)
    memory.new(2, 3)
    with complains("5 numbers more than the 6 of 10 that are in use", FastMemoryFull):
        memory.new(5)
    with pytest.raises(FastMemoryFull):
        memory.load(Slow(np.zeros(5)))
    assert (memory.used, memory.loaded) == (6, 0)
    memory.new(4)


def test_what_was_given_back_is_gone():
    memory = TwoLevelMemory(10)
    with memory.frame():
        outer = memory.new(3, fill=1.0)
        with memory.frame():
            inner = memory.new(7, fill=2.0)
        assert np.isnan(inner.tolist()).all()
        assert memory.used == 3
        assert (np.asarray(outer) == 1).all()
    assert memory.used == 0
    assert memory.most == 10


def test_fast_memory_is_given_back_after_an_error_too():
    memory = TwoLevelMemory(10)

    def fail():
        with memory.frame():
            memory.new(10)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert memory.used == 0


def test_results_need_a_place():
    memory = TwoLevelMemory(100)
    a, b, c = memory.new(3, 3, fill=2), memory.new(3, 3, fill=3), memory.new(3, 3)
    for compute in (lambda: a + b, lambda: np.exp(a), lambda: a @ b, lambda: np.add.reduce(a, axis=0)):
        with pytest.raises(TypeError, match="needs a place in the fast memory; pass out="):
            compute()
    np.matmul(a, b.T, out=c)
    assert (np.asarray(c) == 18).all()
    c += a
    np.maximum(c, 1e9, out=c)
    np.add.reduce(c, axis=1, out=a[:, 0])
    assert a[0, 0] == 3e9
    assert memory.used == 27


def test_a_capacity_is_a_count():
    with complains("capacity: expected an integer ≥ 1, got 0"):
        TwoLevelMemory(0)
