"""Edit distance."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbook.analysis.errors import edit_distance, nearest_reference

short = st.text(alphabet="abc", max_size=7)


def by_definition(first, second):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        )

    return distance(len(first), len(second))


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_known_distances(first, second, distance):
    assert edit_distance(first, second) == distance


def test_items_may_be_anything():
    assert edit_distance(("AH", "T"), ["AH", "D", "T"]) == 1


@given(short, short)
def test_equals_the_definition(first, second):
    assert edit_distance(first, second) == by_definition(first, second)


@given(short, short, short)
def test_it_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_nearest_reference_gives_its_distance_and_length():
    assert nearest_reference("abcd", ["x", "abd", "abcdef"]) == (1, 3)
    assert nearest_reference("ab", ["abcde", "abc"]) == (1, 3)
