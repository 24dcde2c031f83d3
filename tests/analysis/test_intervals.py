"""Resampling and intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from attnbook.analysis.intervals import bootstrap, interval, take
from helpers import complains


class Columns(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def generator():
    return np.random.default_rng(0)


def test_take_keeps_the_columns_together():
    columns = Columns(np.arange(5.0), 10 * np.arange(5.0))
    taken = take(columns, [3, 3, 0])
    assert isinstance(taken, Columns)
    assert taken.x.tolist() == [3, 3, 0]
    assert taken.y.tolist() == [30, 30, 0]
    assert take(np.arange(5.0), np.arange(5) > 2).tolist() == [3, 4]


def test_the_bootstrap_finds_the_standard_error_of_a_mean():
    sample = generator().standard_normal(400)
    means = bootstrap(np.mean, sample, count=2000, generator=generator())
    assert means.shape == (2000,)
    assert means.std() == pytest.approx(sample.std() / 20, rel=0.05)
    low, high = interval(means)
    assert low < sample.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.07)


def test_subsampling_without_replacement_has_its_own_smaller_spread():
    sample = generator().standard_normal(400)
    means = bootstrap(np.mean, sample, count=2000, generator=generator(), share=0.8, replace=False)
    assert means.std() == pytest.approx(sample.std() / 20 * (0.2 / 0.8) ** 0.5, rel=0.06)


def test_vectors_of_estimates_and_rows_that_fail():
    def estimate(columns):
        if columns.x[0] == 0:
            raise ValueError("no")
        return columns.x.mean(), columns.y.mean()

    found = bootstrap(estimate, Columns(np.arange(4.0), 2 * np.arange(4.0)), count=50, generator=generator())
    assert found.shape == (50, 2)
    failed = np.isnan(found).any(1)
    assert 0 < failed.sum() < 50
    np.testing.assert_allclose(found[~failed, 1], 2 * found[~failed, 0])
    assert all(np.isfinite(interval(found[:, 0])))


def test_the_same_generator_gives_the_same_samples():
    sample = np.arange(20.0)
    first, second = (bootstrap(np.mean, sample, count=5, generator=generator()) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_interval_holds_its_share():
    assert interval(np.arange(101.0), 0.8) == (pytest.approx(10), pytest.approx(90))


def always_wrong(sample):
    raise ValueError("never")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: bootstrap(np.mean, np.ones(3), count=0, generator=generator()),
            "count: expected an integer ≥ 1, got 0",
        ),
        (
            lambda: bootstrap(np.mean, np.ones(3), count=1, generator=generator(), share=0),
            "share: expected a number in (0, 1], got 0",
        ),
        (
            lambda: bootstrap(np.mean, np.ones(3), count=1, generator=generator(), share=1.5),
            "share: expected a number in (0, 1], got 1.5",
        ),
        (
            lambda: bootstrap(always_wrong, np.ones(3), count=2, generator=generator()),
            "estimate: expected a value for some of the samples, got ValueError for all of them",
        ),
        (lambda: interval([1, 2], 1), "level: expected a number between 0 and 1, got 1"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
