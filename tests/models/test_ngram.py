"""Kneser–Ney against a calculation by hand, a slow implementation, and add-one smoothing."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from attnbook.models import KneserNey
from attnbook.models import ngram as module
from helpers import complains, loaded


def test_a_small_example_by_hand():
    # Bigrams of 0000 11 00 111: 00 four times, 01 twice, 10 once, 11 three times, so n₁ = n₂ = n₃ = n₄ = 1, Y = 1/3,
    # and the discounts are 1/3, 1 and 5/3. Both tokens follow two contexts: the lower order says 1/2 each.
    model = KneserNey(2, 2).fit([0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1])
    assert model.probabilities([]) == pytest.approx([1 / 2, 1 / 2])
    # After 0: (4 − 5/3)/6 + (5/3 + 1)/6 · 1/2 = 11/18. After 1: (1 − 1/3)/4 + (1/3 + 5/3)/4 · 1/2 = 5/12.
    assert model.probabilities([0]) == pytest.approx([11 / 18, 7 / 18])
    assert model.probabilities([1]) == pytest.approx([5 / 12, 7 / 12])
    assert model.num_parameters() == (4 + 2 * 2) + (2 + 2 * 1)
    expected = np.log([1 / 2, 11 / 18, 7 / 18, 7 / 12])
    assert model.log_probabilities([0, 0, 1, 1]) == pytest.approx(expected)


class Slow:
    """Chen and Goodman's interpolated modified Kneser–Ney, from dictionaries and recursion."""

    def __init__(self, text, order, vocab_size):
        self.vocab_size = vocab_size
        self.counts = {order: Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in self.counts[n + 1])
        self.discounts = {}
        for n, counts in self.counts.items():
            of = Counter(counts.values())
            n1, n2, n3, n4 = (max(of[c], 1) for c in (1, 2, 3, 4))
            y = n1 / (n1 + 2 * n2)
            values = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
            self.discounts[n] = [max(value, 0) for value in values]

    def probability(self, context, token):
        n = len(context) + 1
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        seen = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == context}
        if not seen:
            return lower
        discount = lambda c: self.discounts[n][min(c, 3) - 1]  # noqa: E731
        total = sum(seen.values())
        own = seen.get((*context, token), 0)
        kept = own - discount(own) if own else 0
        return kept / total + sum(discount(c) for c in seen.values()) / total * lower


@pytest.fixture
def text():
    rng = np.random.default_rng(0)
    return rng.choice(5, size=300, p=[0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_a_slow_implementation(order, text):
    model, slow = KneserNey(order, 6).fit(text), Slow(text.tolist(), order, 6)  # token 5 never occurs
    for length in range(order):
        for context in itertools.islice(itertools.product(range(6), repeat=length), 0, None, 7):
            expected = [slow.probability(context, token) for token in range(6)]
            assert model.probabilities(list(context)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_context(order, text):
    model = KneserNey(order, 6).fit(text)
    for length in range(order + 1):
        for context in itertools.product(range(6), repeat=length):
            probability = model.probabilities(context)
            assert probability.sum() == pytest.approx(1, abs=1e-12)
            assert (probability > 0).all()


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("per_block", [1, 7, 1 << 18])
def test_log_probabilities_agree_with_probabilities(order, per_block, text, monkeypatch):
    monkeypatch.setattr(module, "_PER_BLOCK", per_block)
    model = KneserNey(order, 6).fit(text)
    new = np.random.default_rng(1).integers(0, 6, size=40)
    expected = [np.log(model.probabilities(new[:i])[token]) for i, token in enumerate(new)]
    assert model.log_probabilities(new) == pytest.approx(expected, abs=1e-12)


def test_only_the_last_tokens_of_a_context_matter(text):
    model = KneserNey(3, 6).fit(text)
    assert np.array_equal(model.probabilities([5, 5, 5, 1, 0]), model.probabilities([1, 0]))


def test_fitting_again_forgets(text):
    model = KneserNey(2, 6).fit(text[::-1].copy()).fit(text)
    assert np.array_equal(model.probabilities([1]), KneserNey(2, 6).fit(text).probabilities([1]))


def add_one_loss(train, test, order, vocab_size):
    """Return the loss of the n-gram model with one added to every count."""
    grams = Counter(zip(*(train[i:].tolist() for i in range(order)), strict=False))
    contexts = Counter(zip(*(train[i : len(train) - order + 1 + i].tolist() for i in range(order - 1)), strict=False))
    total = 0.0
    for gram in zip(*(test[i:].tolist() for i in range(order)), strict=False):
        total -= np.log((grams[gram] + 1) / (contexts[gram[:-1]] + vocab_size))
    return total / (len(test) - order + 1)


def test_better_than_add_one_smoothing_on_tinyshakespeare():
    text = loaded("tinyshakespeare")
    train, test = text.train.numpy(), text.validation.numpy()[:20_000]
    loss = {n: -KneserNey(n, 65).fit(train).log_probabilities(test)[n:].mean() for n in (3, 5)}
    for n, value in loss.items():  # bigrams of 65 characters are seen so often that smoothing hardly matters
        assert value < add_one_loss(train, test, n, 65) - 0.002
    assert loss[5] < loss[3]


FITTED = KneserNey(2, 3).fit([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: KneserNey(0, 3), "order: expected an integer ≥ 1, got 0"),
        (lambda: KneserNey(2, 1), "vocab_size: expected an integer ≥ 2, got 1"),
        (lambda: KneserNey(11, 65), "order: expected at most 10 for 65 tokens, got 11"),
        (lambda: KneserNey(3, 3).fit([0, 1]), "tokens: expected at least 3 tokens, got 2"),
        (lambda: KneserNey(2, 3).fit([0, 3]), "tokens: expected integers in [0, 2], got up to 3"),
        (lambda: KneserNey(2, 3).fit([0, -1]), "tokens: expected integers in [0, 2], got …"),
        (
            lambda: KneserNey(2, 3).fit([0.0, 1.0]),
            "tokens: expected a non-empty sequence of integers, got float64 array of shape (2,)",
        ),
        (
            lambda: KneserNey(2, 3).fit([[0, 1]]),
            "tokens: expected a non-empty sequence of integers, got int64 array of shape (1, 2)",
        ),
        (
            lambda: FITTED.log_probabilities([]),
            "tokens: expected a non-empty sequence of integers, got float64 array of shape (0,)",
        ),
        (
            lambda: FITTED.probabilities(1),
            "tokens: expected a non-empty sequence of integers, got int64 array of shape ()",
        ),
        (lambda: KneserNey(2, 3).probabilities([0]), "self: expected a fitted model, got one without counts"),
        (lambda: KneserNey(2, 3).log_probabilities([0]), "self: expected a fitted model, got one without counts"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
