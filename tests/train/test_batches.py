"""The order of the batches."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from attnbook.train import Shuffled, Windows
from attnbook.train.batches import stream
from helpers import complains, tokens

TEXT = tokens(50, high=9)


def test_windows_are_of_the_text_and_their_targets_one_token_on():
    batches, text = Windows(torch.arange(50), 6, 5, seed=1), torch.arange(50)
    for inputs, targets in islice(batches, 20):
        assert inputs.shape == targets.shape == (6, 5)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, text[inputs[:, :1] + torch.arange(5)])
    starts = torch.cat([batches.at(i)[0][:, 0] for i in range(200)])
    assert set(starts.tolist()) == set(range(45))  # every window can come


@pytest.mark.parametrize(
    "batches", [Windows(TEXT, 3, 4, seed=7), Shuffled(TEXT, batch_size=8, seed=7)], ids=["windows", "shuffled"]
)
def test_any_batch_can_be_had_alone(batches):
    first = [part[0] for part in islice(batches, 30)]
    for number in (29, 3, 17, 3):
        assert torch.equal(batches.at(number)[0], first[number])
    assert torch.equal(next(stream(batches, 12))[0], first[12])
    torch.manual_seed(5)
    assert torch.equal(batches.at(3)[0], first[3])  # whatever the global generator does
    assert not any(torch.equal(first[0], other) for other in first[1:])


def test_seeds_give_other_orders():
    assert not torch.equal(Windows(TEXT, 3, 4, seed=0).at(1)[0], Windows(TEXT, 3, 4, seed=1).at(0)[0])
    one, two = (Shuffled(torch.arange(40), batch_size=40, seed=seed).at(0)[0] for seed in (0, 1))
    assert not torch.equal(one, two)


def test_an_epoch_has_every_example_once_with_its_own_label():
    x, y = torch.arange(11), torch.arange(11) * 2
    batches = Shuffled(x, y, batch_size=3, seed=0)
    orders = []
    for epoch in range(3):
        parts = [batches.at(3 * epoch + i) for i in range(3)]
        seen = torch.cat([part[0] for part in parts])
        assert len(set(seen.tolist())) == 9
        assert torch.equal(torch.cat([part[1] for part in parts]), 2 * seen)
        orders.append(seen.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_batches_without_random_access_are_skipped():
    assert list(islice(stream(["a", "b", "c"], 4), 3)) == ["b", "c", "a"]
    assert next(stream(iter("abc"), 2)) == "c"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Windows(TEXT, 0, 4), "batch_size: expected an integer ≥ 1, got 0"),
        (lambda: Windows(TEXT, 1, 50), "length: expected below the 50 tokens of the text, got 50"),
        (lambda: Windows(TEXT, 1, 4, seed=-1), "seed: expected an integer ≥ 0, got -1"),
        (lambda: Windows([1], 1, 1), "tokens: expected a tensor (length), got list"),
        (lambda: Shuffled(batch_size=1), "examples: expected at least one tensor, got none"),
        (
            lambda: Shuffled(TEXT, TEXT[1:], batch_size=1),
            "examples: expected first axes of 50, got int64 tensor of shape (49,)",
        ),
        (lambda: Shuffled(TEXT, batch_size=51), "batch_size: expected at most the 50 examples, got 51"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
