"""Exercises: the verdict on an answer."""

from __future__ import annotations

from functools import partial

import pytest

from attnbook.exercises import ATTEMPT, attempt


def check(answer):
    assert answer(2) == 4, "two squared is four"
    assert answer(3) == 9


def square(x):
    return x * x


def stub(x):
    raise NotImplementedError


def wrong(x):
    return x + x


def broken(x):
    return x.missing


@pytest.mark.parametrize(
    ("answer", "passed", "text"),
    [
        (square, True, "✓ square passes"),
        (stub, False, "✗ stub is not there yet: NotImplementedError"),
        (lambda x: 5, False, "✗ <lambda> is not there yet: two squared is four"),
        (broken, False, "✗ broken is not there yet: 'int' object has no attribute 'missing'"),
        (partial(pow, exp=2), True, "✓ partial passes"),
    ],
)
def test_the_verdict_in_words(answer, passed, text):
    found = attempt(check, answer)
    assert found.passed == passed
    assert repr(found).startswith(text)


def test_an_assertion_without_words_is_named():
    def bare(answer):
        raise AssertionError

    assert repr(attempt(bare, wrong)) == "✗ wrong is not there yet: AssertionError"


def test_the_notebook_keeps_a_record():
    bundle = attempt(check, square)._repr_mimebundle_()
    assert bundle == {"text/plain": "✓ square passes", ATTEMPT: {"name": "square", "passed": True}}


def test_an_interruption_is_no_verdict():
    def interrupted(answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted, square)
