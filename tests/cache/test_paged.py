"""Paged caches: what was appended is what comes back, and common pages are kept once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbook.cache import PagedCache, StaticCache
from helpers import complains


def pair(batch, length, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, length, 4, generator=draws), torch.randn(batch, 3, length, 5, generator=draws)


def accounts(cache):
    """Assert that every page is either free or held as often as tables name it."""
    named = [page for table in cache.tables for page in table]
    assert cache.holders == [named.count(page) for page in range(len(cache.holders))]
    assert sorted(cache.free) == [page for page, count in enumerate(cache.holders) if not count]


steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 5)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("truncate"), st.floats(0, 1)),
    st.tuples(st.just("reset"), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=12), st.integers(1, 5))
def test_pages_hold_what_a_static_cache_holds(script, page_size):
    paged = PagedCache(3, 3, 20, 4, value_dim=5, page_size=page_size)
    static = StaticCache(3, 3, 20, 4, value_dim=5)
    for number, (action, value) in enumerate(script):
        if action == "append" and static.length + value <= 20:
            ours, expected = (cache.update(*pair(3, value, number)) for cache in (paged, static))
            assert torch.equal(ours[0], expected[0])
            assert torch.equal(ours[1], expected[1])
        elif action == "reorder" and static.length:
            for cache in (paged, static):
                cache.reorder(torch.tensor(value))
        elif action == "truncate":
            for cache in (paged, static):
                cache.truncate(int(value * cache.length))
        elif action == "reset":
            paged.reset()
            static.reset()
        assert paged.length == static.length
        accounts(paged)


def test_one_prompt_continued_many_times_is_kept_once():
    cache = PagedCache(1, 3, 16, 4, value_dim=5, page_size=4, num_pages=8)
    key, value = pair(1, 6)
    cache.update(key, value)
    cache.reorder(torch.zeros(3, dtype=torch.int64))
    assert len(cache.free) == 6  # still two pages
    more = pair(3, 1, seed=1)
    keys, _ = cache.update(*more)
    assert torch.equal(keys, torch.cat([key.expand(3, -1, -1, -1), more[0]], 2))
    assert len({table[0] for table in cache.tables}) == 1  # the full page is shared,
    assert len({table[1] for table in cache.tables}) == 3  # the begun one was copied by all but its last holder
    assert len(cache.free) == 4
    accounts(cache)


def test_memory_follows_what_is_held():
    cache = PagedCache(2, 3, 16, 4, page_size=4)
    assert cache.nbytes() == 2 * (8 * 3 * 4 * 4) * 4
    assert cache.nbytes(held=True) == 0
    cache.update(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4))
    assert cache.nbytes(held=True) == cache.nbytes() // 2


def test_too_few_pages_leave_the_cache_as_it_was():
    cache = PagedCache(2, 3, 16, 4, value_dim=5, page_size=4, num_pages=3)
    cache.update(*pair(2, 3))
    with complains("key: expected positions for at most 1 more pages, got positions for 2"):
        cache.update(*pair(2, 2))
    assert cache.length == 3
    accounts(cache)
    assert cache.update(*pair(2, 1))[0].shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.update(*pair(2, 17)), "key: expected at most 16 more positions, got 17"),
        (lambda c: c.reorder(torch.tensor([0, 2])), "index: expected integers in [0, 1], got [0, 2]"),
        (lambda c: c.truncate(1), "length: expected at most 0, got 1"),
        (lambda c: PagedCache(1, 1, 1, 1, page_size=0), "page_size: expected an integer ≥ 1, got 0"),
        (lambda c: PagedCache(1, 1, 1, 1, num_pages=0), "num_pages: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call(PagedCache(2, 3, 16, 4, value_dim=5, page_size=4))
