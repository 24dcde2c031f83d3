"""Renaming SCAN's verbs, and predictors that commute with it."""

from __future__ import annotations

import random

import pytest

from attnbook import data
from attnbook.analysis import symmetry
from helpers import complains


def test_the_group():
    group = symmetry.renamings()
    assert len({tuple(g.items()) for g in group}) == 24
    assert all(old == new for old, new in group[0].items())
    command = ("jump", "left", "and", "walk")
    for g in group:
        assert symmetry.act(symmetry.inverse(g), symmetry.act(g, command)) == command


def test_acting_by_hand():
    g = {"walk": "jump", "jump": "walk", "look": "look", "run": "run"}
    assert symmetry.act(g, ("walk", "left", "twice")) == ("jump", "left", "twice")
    assert symmetry.act(g, ("I_TURN_LEFT", "I_JUMP")) == ("I_TURN_LEFT", "I_WALK")


def test_the_interpretation_commutes():
    meaning = dict(data.load("scan"))
    g = dict(zip(("walk", "look", "run", "jump"), ("look", "run", "jump", "walk"), strict=True))
    assert all(meaning[symmetry.act(g, x)] == symmetry.act(g, y) for x, y in meaning.items())


def test_canonical_by_hand():
    assert symmetry.canonical(("turn", "left"))["jump"] == "jump"
    g = symmetry.canonical(("jump", "after", "run", "twice"))
    assert symmetry.act(g, ("jump", "after", "run", "twice")) == ("walk", "after", "look", "twice")
    assert g["walk"] == "run"
    assert g["look"] == "jump"


@pytest.mark.parametrize("seed", range(3))
def test_any_predictor_becomes_equivariant(seed):
    actions = ("I_WALK", "I_LOOK", "I_RUN", "I_JUMP", "I_TURN_LEFT")

    def predict(commands):
        return [random.Random(f"{seed}{command}").choices(actions, k=6) for command in commands]

    symmetric = symmetry.symmetrise(predict)
    commands = [command for command, _ in data.load("scan")[::997]]
    for g in symmetry.renamings():
        renamed = symmetric([symmetry.act(g, command) for command in commands])
        assert renamed == [symmetry.act(g, found) for found in symmetric(commands)]


def test_the_truth_stays_true():
    meaning = dict(data.load("scan"))
    commands = list(meaning)[::501]
    assert symmetry.symmetrise(lambda xs: [meaning[x] for x in xs])(commands) == [meaning[x] for x in commands]


def test_no_renaming():
    with complains("renaming: expected a permutation of walk, look, run, jump, got dict"):
        symmetry.act({"walk": "jump"}, ("walk",))
