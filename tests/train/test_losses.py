"""Losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from attnbook.train import next_token_loss, sequence_loss, token_loss
from helpers import complains, tokens


class Given(nn.Module):
    """A model that returns what it was given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, *_):
        return self.logits


def test_token_loss_is_the_mean_negative_log_likelihood():
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), tokens(2, 3, high=5)
    expected = -sum(logits[b, t, targets[b, t]] - logits[b, t].logsumexp(-1) for b in range(2) for t in range(3)) / 6
    assert token_loss(Given(logits), (None, targets)).item() == pytest.approx(expected.item())


def test_token_loss_of_even_logits_is_log_v():
    assert token_loss(Given(torch.zeros(2, 3, 7)), (None, tokens(2, 3, high=7))).item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_sequence_loss_leaves_padding_out_and_smooths(smoothing):
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    outputs = torch.tensor([[3, 1, 4, 0], [2, 0, 0, 0]])
    found = sequence_loss(label_smoothing=smoothing)(Given(logits), (None, None, outputs))
    losses = []
    for b, t in ((0, 0), (0, 1), (0, 2), (1, 0)):
        log_p = logits[b, t].log_softmax(-1)
        target = torch.full((5,), smoothing / 5, dtype=torch.float64)
        target[outputs[b, t]] += 1 - smoothing
        losses.append(-(target * log_p).sum())
    assert found.item() == pytest.approx((sum(losses) / 4).item())


def test_padding_gets_no_gradient():
    model = Given(torch.randn(1, 3, 5))
    sequence_loss(label_smoothing=0.1)(model, (None, None, torch.tensor([[2, 0, 0]]))).backward()
    assert (model.logits.grad[0, 0] != 0).any()
    assert (model.logits.grad[0, 1:] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_very_sure_predictions_give_finite_losses(smoothing):
    # Smoothing by hand takes the logarithm of a probability that is 0 in float32.
    logits = torch.full((1, 1, 4), -1e4)
    logits[..., 2] = 1e4
    loss = sequence_loss(label_smoothing=smoothing)(Given(logits), (None, None, torch.tensor([[2]])))
    assert loss.isfinite()
    assert loss.item() == pytest.approx(smoothing * 3 / 4 * 2e4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_next_token_loss_smooths(smoothing):
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), tokens(2, 3, high=5)
    mixed = (1 - smoothing) * nn.functional.one_hot(targets, 5) + smoothing / 5
    expected = -(mixed * logits.log_softmax(-1)).sum(-1).mean()
    assert next_token_loss(label_smoothing=smoothing)(Given(logits), (None, targets)).item() == pytest.approx(
        expected.item()
    )
    sure = next_token_loss(label_smoothing=smoothing)(
        Given(torch.tensor([[[1e4, -1e4]]])), (None, tokens(1, 1, high=1))
    )
    assert sure.item() == pytest.approx(smoothing / 2 * 2e4)


@pytest.mark.parametrize("make", [next_token_loss, sequence_loss])
def test_impossible_smoothing_is_named(make):
    with complains("label_smoothing: expected a number in [0, 1), got 1.0"):
        make(label_smoothing=1.0)
