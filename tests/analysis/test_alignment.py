"""Word alignments and their scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbook.analysis.alignment import IBMModel1, diagonal, from_weights, scores
from helpers import complains


def test_from_weights_takes_the_largest_of_each_row():
    weights = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]
    assert from_weights(weights) == {(1, 0), (0, 1)}
    assert from_weights(torch.tensor(weights)) == from_weights(np.array(weights))


def test_diagonal():
    assert diagonal(3, 3) == {(0, 0), (1, 1), (2, 2)}
    assert diagonal(4, 2) == {(1, 0), (3, 1)}
    assert diagonal(2, 4) == {(0, 0), (0, 1), (1, 2), (1, 3)}
    assert diagonal(1, 3) == {(0, 0), (0, 1), (0, 2)}


@given(st.integers(1, 30), st.integers(1, 30))
def test_diagonal_links_every_target_word_and_never_goes_back(source, target):
    links = sorted(diagonal(source, target), key=lambda link: link[1])
    assert [j for _, j in links] == list(range(target))
    assert [i for i, _ in links] == sorted(i for i, _ in links)
    assert all(0 <= i < source for i, _ in links)


def test_scores_by_hand():
    predicted = [frozenset({(0, 0), (1, 1)}), frozenset({(0, 0)})]
    gold = [frozenset({(0, 0), (1, 2), (2, 2)}), frozenset({(0, 0)})]
    assert scores(predicted, gold) == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 4),
        "aer": pytest.approx(1 - 2 * 2 / (3 + 4)),
    }
    assert scores(iter(gold), iter(gold)) == {"precision": 1, "recall": 1, "aer": 0}


def words(text):
    return text.split()


CLASSIC = [
    (words("das haus"), words("the house")),
    (words("das buch"), words("the book")),
    (words("ein buch"), words("a book")),
]


def slow_model1(pairs, iterations):
    """Return t(target word | source word) of model 1, by dictionaries."""
    cells = {(s, t) for source, target in pairs for s in (None, *source) for t in target}
    table = dict.fromkeys(cells, 1.0)
    for _ in range(iterations):
        counts = dict.fromkeys(cells, 0.0)
        for source, target in pairs:
            for t in target:
                total = sum(table[s, t] for s in (None, *source))
                for s in (None, *source):
                    counts[s, t] += table[s, t] / total
        totals = {s: sum(c for (a, _), c in counts.items() if a == s) for s, _ in cells}
        table = {(s, t): c / totals[s] for (s, t), c in counts.items()}
    return table


@pytest.mark.parametrize("iterations", [1, 2, 5, 20])
def test_model1_equals_a_slow_implementation(iterations):
    model = IBMModel1(CLASSIC, iterations=iterations)
    expected = slow_model1(CLASSIC, iterations)
    for (source, target), probability in expected.items():
        code = (0 if source is None else model._source[source]) * len(model._target) + model._target[target]
        assert model._table[model._codes == code].item() == pytest.approx(probability, rel=1e-9)


def test_model1_learns_the_classic_example():
    model = IBMModel1(CLASSIC, iterations=50)
    assert model.align(words("das buch"), words("the book")) == {(0, 0), (1, 1)}
    assert model.align(words("ein buch"), words("a book")) == {(0, 0), (1, 1)}
    assert model.align(words("ein haus"), words("a house")) == {(0, 0), (1, 1)}  # a pair that it never saw


def test_model1_leaves_words_to_the_empty_word():
    pairs = [(words(f"w{i}"), [f"v{i}", "of"]) for i in range(12)]
    model = IBMModel1(pairs, iterations=30)
    assert model.align(["w3"], ["v3", "of"]) == {(0, 0)}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: from_weights([0.5, 0.5]), "weights: expected (T, S), neither of them empty, got shape (2,)"),
        (lambda: from_weights(np.zeros((0, 3))), "weights: expected (T, S), neither of them empty, got shape (0, 3)"),
        (lambda: diagonal(0, 2), "source_length: expected an integer ≥ 1, got 0"),
        (lambda: diagonal(2, 0), "target_length: expected an integer ≥ 1, got 0"),
        (
            lambda: scores([frozenset({(0, 0)})], []),
            "predicted: expected 0 sentences, as many as gold, got 1",
        ),
        (
            lambda: scores([frozenset()], [frozenset({(0, 0)})]),
            "predicted, gold: expected at least one link in each, got 0 and 1",
        ),
        (lambda: scores([], []), "predicted, gold: expected at least one link in each, got 0 and 0"),
        (lambda: IBMModel1([]), "pairs: expected at least one, got none"),
        (lambda: IBMModel1(CLASSIC, iterations=0), "iterations: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()


def test_unknown_words_are_key_errors():
    with pytest.raises(KeyError, match="katze"):
        IBMModel1(CLASSIC).align(["katze"], ["the"])
