"""Learning-rate schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbook.train import SCHEDULES, schedule
from helpers import complains


@given(st.sampled_from(SCHEDULES), st.integers(1, 200), st.integers(0, 199), st.floats(0, 1))
def test_factors_rise_to_one_and_never_exceed_it(name, steps, warmup, final):
    warmup %= steps
    factor = schedule(name, steps=steps, warmup=warmup, final=final)
    values = [factor(step) for step in range(steps)]
    assert all(0 <= value <= 1 for value in values)
    assert values[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    assert values[warmup] == pytest.approx(1)
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_last_step_has_the_final_factor(name):
    factor = schedule(name, steps=11, warmup=0, final=0.1)
    assert factor(10) == pytest.approx(0.1)
    assert factor(5) == pytest.approx(0.55)  # halfway
    assert factor(1000) == pytest.approx(0.1)


def test_the_shapes_in_between():
    cosine, linear = (schedule(name, steps=101, final=0.2) for name in ("cosine", "linear"))
    for step in range(101):
        assert cosine(step) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * step / 100)) / 2)
        assert linear(step) == pytest.approx(1 - 0.8 * step / 100)
    root = schedule("inverse_sqrt", steps=100, warmup=3)
    assert [root(step) for step in (3, 15, 63)] == pytest.approx([1, 1 / 2, 1 / 4])
    assert {schedule("constant", steps=9)(step) for step in range(9)} == {1.0}


def test_wsd_stays_at_the_peak_and_falls_in_its_cooldown():
    factor = schedule("wsd", steps=101, warmup=10, final=0.1, cooldown=40)
    assert {factor(step) for step in range(10, 61)} == {1.0}
    for step in range(60, 101):
        assert factor(step) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt((step - 60) / 40)))
    assert factor(1000) == pytest.approx(0.1)
    assert [schedule("wsd", steps=101)(step) for step in (80, 85, 100)] == pytest.approx([1, 0.5, 0])


def test_inverse_sqrt_is_the_papers_up_to_a_factor():
    # {cite}`vaswani2017`, eq. 3: min(step^−½, step · warmup^−1.5), steps counted from 1.
    factor = schedule("inverse_sqrt", steps=1000, warmup=99)
    for step in (1, 50, 100, 400, 1000):
        assert factor(step - 1) == pytest.approx(min(step**-0.5, step * 100**-1.5) / 100**-0.5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "step"}, "name: expected one of 'constant', 'cosine', 'linear', 'inverse_sqrt', 'wsd', got 'step'"),
        ({"steps": 0}, "steps: expected an integer ≥ 1, got 0"),
        ({"warmup": -1}, "warmup: expected an integer ≥ 0, got -1"),
        ({"warmup": 10}, "warmup: expected fewer than the 10 steps, got 10"),
        ({"final": -0.1}, "final: expected a number in [0, 1], got -0.1"),
        ({"final": math.nan}, "final: expected a number in [0, 1], got nan"),
        ({"cooldown": 3}, "cooldown: expected None with schedule 'cosine', got 3"),
        ({"name": "wsd", "cooldown": 0}, "cooldown: expected an integer ≥ 1, got 0"),
        ({"name": "wsd", "warmup": 4, "cooldown": 6}, "cooldown: expected at most the 5 steps after the peak, got 6"),
    ],
)
def test_bad_arguments_are_named(options, text):
    with complains(text):
        schedule(**{"name": "cosine", "steps": 10, **options})
