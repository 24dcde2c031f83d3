"""Traffic: three ways of computing attention give the same output and move what their formulas say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbook import reference
from attnbook.analysis import traffic
from attnbook.analysis.two_level import FastMemoryFull
from helpers import complains

SIZES = [(9, 14, 4, 3), (12, 12, 4, 4), (1, 7, 3, 5), (7, 1, 5, 2), (1, 1, 1, 1)]


def operands(L, S, D, Dv):
    draw = np.random.default_rng(0).normal
    return draw(size=(L, D)), draw(size=(S, D)), draw(size=(S, Dv))


def specification(q, k, v):
    return reference.attention(q[None, None], k[None, None], v[None, None])[0, 0]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("capacity", [25, 40, 111, 5000])
def test_naive(sizes, capacity):
    found = traffic.naive(*operands(*sizes), capacity=capacity)
    np.testing.assert_allclose(found.output, specification(*operands(*sizes)), rtol=1e-12, atol=1e-13)
    assert found.moved == traffic.naive_count(*sizes, tile=traffic.naive_tile(capacity))
    assert found.most <= capacity


@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("way", ["by_queries", "by_keys"])
@pytest.mark.parametrize("capacity", [80, 111, 5000])
def test_tiled(way, sizes, capacity, inner):
    block = getattr(traffic, f"{way}_block")(capacity, *sizes[2:], inner)
    found = getattr(traffic, way)(*operands(*sizes), capacity=capacity, inner=inner)
    np.testing.assert_allclose(found.output, specification(*operands(*sizes)), rtol=1e-12, atol=1e-13)
    assert found.moved == getattr(traffic, f"{way}_count")(*sizes, outer=block)
    assert found.most <= capacity


@given(st.integers(14, 10**6))
def test_the_tile_is_the_largest_that_fits(capacity):
    t = traffic.naive_tile(capacity)
    assert 3 * t * t + t <= capacity < 3 * (t + 1) ** 2 + t + 1


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 9), st.integers(0, 3000))
def test_the_blocks_are_the_largest_that_fit(D, Dv, inner, more):
    smallest = inner * (D + Dv) + D + Dv + 4 + inner
    r = traffic.by_queries_block(smallest + more, D, Dv, inner)
    room = lambda r: r * (D + Dv + 4 + inner) + inner * (D + Dv)  # noqa: E731
    assert room(r) <= smallest + more < room(r + 1)
    smallest = inner * (D + Dv + 4) + D + Dv + inner
    c = traffic.by_keys_block(smallest + more, D, Dv, inner)
    room = lambda c: c * (D + Dv + inner) + inner * (D + Dv + 4)  # noqa: E731
    assert room(c) <= smallest + more < room(c + 1)


@pytest.mark.parametrize("way", ["by_queries", "by_keys"])
def test_the_largest_block_fills_the_memory_and_one_more_is_refused(way):
    q, k, v = operands(40, 40, 4, 3)
    block = getattr(traffic, f"{way}_block")(150, 4, 3, 2)
    run = getattr(traffic, way)
    assert 150 - 13 < run(q, k, v, capacity=150, outer=block, inner=2).most <= 150
    with pytest.raises(FastMemoryFull):
        run(q, k, v, capacity=150, outer=block + 1, inner=2)


def test_a_tile_that_is_too_large_is_refused():
    q, k, v = operands(40, 40, 10, 10)
    with pytest.raises(FastMemoryFull):
        traffic.naive(q, k, v, capacity=100, tile=traffic.naive_tile(100) + 1)


def test_the_inner_block_does_not_change_the_traffic():
    q, k, v = operands(20, 20, 4, 3)
    for run in (traffic.by_queries, traffic.by_keys):
        assert len({run(q, k, v, capacity=500, outer=6, inner=n).moved for n in (1, 3, 20, 99)}) == 1


def test_inputs_are_unchanged():
    arrays = operands(9, 14, 4, 3)
    before = [x.copy() for x in arrays]
    for run in (traffic.naive, traffic.by_queries, traffic.by_keys):
        run(*arrays, capacity=200)
    for now, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(now, then)


Q, K, V = operands(5, 6, 4, 3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: traffic.naive(Q[0], K, V, capacity=99),
            "query: expected two axes, none of them empty, got shape (4,)",
        ),
        (
            lambda: traffic.by_keys(Q, K[:, :2], V, capacity=99),
            "key: expected last axis D = 4, that of query, got shape (6, 2)",
        ),
        (
            lambda: traffic.by_queries(Q, K, V[:5], capacity=99),
            "value: expected first axis S = 6, that of key, got shape (5, 3)",
        ),
        (lambda: traffic.naive(Q, K, V, capacity=13), "capacity: expected an integer ≥ 14, got 13"),
        (lambda: traffic.by_queries(Q, K, V, capacity=18), "capacity: expected an integer ≥ 19, got 18"),
        (lambda: traffic.by_keys(Q, K, V, capacity=18), "capacity: expected an integer ≥ 19, got 18"),
        (lambda: traffic.naive(Q, K, V, capacity=99, tile=0), "tile: expected an integer ≥ 1, got 0"),
        (lambda: traffic.by_keys(Q, K, V, capacity=99, inner=0), "inner: expected an integer ≥ 1, got 0"),
        (lambda: traffic.by_queries(Q, K, V, capacity=99, outer=0), "outer: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
