"""The Decision Transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import DecisionConfig, DecisionTransformer
from helpers import complains, tokens

SMALL = {"state_dim": 3, "action_dim": 2, "context_length": 5, "max_steps": 9, "width": 16, "depth": 2, "num_heads": 2}
NUMBERS, CHOICES = DecisionConfig(**SMALL), DecisionConfig(**SMALL, discrete=True, hidden=20)


def episodes(config, batch=3, length=5, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    returns = torch.randn(batch, length, generator=draw, dtype=dtype)
    states = torch.randn(batch, length, 3, generator=draw, dtype=dtype)
    numbers = torch.randn(batch, length, 2, generator=draw, dtype=dtype)
    actions = tokens(batch, length, high=2) if config.discrete else numbers
    return returns, states, actions, torch.arange(length).expand(batch, -1)


@pytest.mark.parametrize("config", [NUMBERS, CHOICES], ids=["numbers", "choices"])
def test_the_formula_counts_the_parameters(config):
    model = DecisionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("config", [NUMBERS, CHOICES], ids=["numbers", "choices"])
def test_shapes_and_gradients(config):
    model = DecisionTransformer(config)
    predicted = model(*episodes(config))
    assert predicted.shape == (3, 5, 2)
    predicted.square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name
    assert model(*episodes(config, length=2)).shape == (3, 2, 2)


def test_an_action_is_predicted_from_what_came_before_it():
    model = DecisionTransformer(NUMBERS).double()
    returns, states, actions, steps = episodes(NUMBERS, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (returns, states, actions)]
    predicted = model(*inputs, steps)
    for i in range(5):
        found = torch.autograd.grad(predicted[:, i].square().sum(), inputs, retain_graph=True)
        to_return, to_state, to_action = (g.abs().flatten(2).sum(-1) if g.dim() == 3 else g.abs() for g in found)
        assert (to_return[:, : i + 1] > 0).all()
        assert (to_state[:, : i + 1] > 0).all()
        assert (to_action[:, :i] > 0).all()
        assert (to_return[:, i + 1 :] == 0).all()
        assert (to_state[:, i + 1 :] == 0).all()
        assert (to_action[:, i:] == 0).all()  # its own action is what it is to predict


def test_padding_in_front_changes_nothing():
    model = DecisionTransformer(NUMBERS).eval()
    short = episodes(NUMBERS, length=3)
    padded = [torch.cat([torch.full_like(x[:, :2], 7), x], 1) for x in short]
    mask = torch.tensor([False, False, True, True, True])
    torch.testing.assert_close(model(*padded, mask=mask)[:, 2:], model(*short), atol=1e-5, rtol=0)
    assert not torch.allclose(model(*padded)[:, 2:], model(*short), atol=1e-3)


def test_one_batch_can_be_learned_by_heart():
    model = DecisionTransformer(CHOICES)
    batch = episodes(CHOICES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(*batch).flatten(0, 1), batch[2].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.05


RETURNS, STATES, ACTIONS, STEPS = episodes(NUMBERS)
MODEL = DecisionTransformer(NUMBERS)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: DecisionConfig(**{**SMALL, "max_steps": 0}), "max_steps: expected an integer ≥ 1, got 0"),
        (
            lambda: MODEL(*episodes(NUMBERS, length=6)),
            "returns: expected at most 5 steps on axis 1, got float32 tensor of shape (3, 6)",
        ),
        (lambda: MODEL(RETURNS, STATES[..., :2], ACTIONS, STEPS), "states: expected shape (3, 5, 3), got float32…"),
        (lambda: MODEL(RETURNS, STATES, ACTIONS[:, 1:], STEPS), "actions: expected shape (3, 5, 2), got float32…"),
        (
            lambda: MODEL(RETURNS, STATES, ACTIONS, STEPS.float()),
            "steps: expected a int64 or int32 tensor, got float32 tensor of shape (3, 5)",
        ),
        (lambda: MODEL(RETURNS, STATES, ACTIONS, STEPS[:1]), "steps: expected shape (3, 5), got int64…"),
        (
            lambda: DecisionTransformer(CHOICES)(RETURNS, STATES, ACTIONS, STEPS),
            "actions: expected a tensor (B, K), got float32 tensor of shape (3, 5, 2)",
        ),
        (
            lambda: MODEL(RETURNS, STATES, ACTIONS, STEPS, mask=torch.ones(3, 5)),
            "mask: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 5)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
