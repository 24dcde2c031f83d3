"""The Transformer between functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from attnbook.models import GalerkinOperator, GalerkinOperatorConfig
from helpers import complains

SMALL = GalerkinOperatorConfig(channels=2, outputs=1, coordinates=1, width=16, depth=2, num_heads=2)
CONFIGS = {kind: replace(SMALL, kind=kind) for kind in ("galerkin", "fourier", "softmax")}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def waves(points: int, batch: int = 3, dtype: torch.dtype = torch.float32):
    """Waves, their derivatives, and the points at which they are known: middles of equal cells."""
    x = (torch.arange(points, dtype=dtype)[:, None] + 0.5) / points
    phase = torch.arange(batch, dtype=dtype)[:, None, None]
    inside = 2 * torch.pi * x + phase
    return torch.cat([inside.sin(), (2 * inside).cos()], -1), inside.cos(), x


@EACH
def test_the_formula_counts_the_parameters(config):
    for changed in (config, replace(config, coordinates=3, hidden=20)):
        assert sum(p.numel() for p in GalerkinOperator(changed).parameters()) == changed.num_parameters()


@EACH
def test_shapes_and_gradients(config):
    model = GalerkinOperator(config)
    function, _, points = waves(12)
    output = model(function, points)
    assert output.shape == (3, 12, 1)
    assert torch.equal(output, model(function, points.expand(3, -1, -1)))
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if config.kind != "softmax" or not name.endswith("projections.1.bias"):  # keys': shifts all scores alike
            assert parameter.grad.abs().max() > 0, name


@EACH
def test_points_are_a_set(config):
    model = GalerkinOperator(config).double()
    function, _, points = waves(9, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(function[:, order], points[order]), model(function, points)[:, order])


@EACH
def test_the_output_depends_on_the_whole_input_function(config):
    model = GalerkinOperator(config).double()
    function, _, points = waves(9, dtype=torch.float64)
    function.requires_grad_()
    (gradient,) = torch.autograd.grad(model(function, points)[:, 4].square().sum(), function)
    assert (gradient.abs().sum(-1) > 0).all()


@EACH
def test_finer_grids_converge_like_the_rule_of_midpoints(config):
    # A third of the step: near a ninth of the error, where a rule of first order would have a third.
    model = GalerkinOperator(config).double()
    with torch.no_grad():
        low, middle, high = (model(f, x) for f, _, x in (waves(n, dtype=torch.float64) for n in (20, 60, 540)))
    first = (low - high[:, 13::27]).abs().max()  # the middle of every 27 cells is the middle of one of 20
    second = (middle - high[:, 4::9]).abs().max()
    assert 5 < first / second < 12


@pytest.mark.parametrize("kind", ["galerkin", "fourier"])
def test_one_batch_can_be_learned_by_heart(kind):
    model, (function, target, points) = GalerkinOperator(CONFIGS[kind]), waves(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(function, points), target)
        loss.backward()
        optimizer.step()
    assert loss < 0.02  # the target's mean square is 1/2


MODEL = GalerkinOperator(SMALL)
FUNCTION, _, POINTS = waves(6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replace(SMALL, coordinates=0), "coordinates: expected an integer ≥ 1, got 0"),
        (
            lambda: replace(SMALL, kind="linear"),
            "kind: expected one of 'galerkin', 'fourier', 'softmax', got 'linear'",
        ),
        (lambda: replace(SMALL, num_heads=3), "num_heads: expected a divisor of width = 16, got 3"),
        (lambda: MODEL(FUNCTION[..., :1], POINTS), "function: expected last axis 2, got shape (3, 6, 1)"),
        (lambda: MODEL(FUNCTION, POINTS[1:]), "points: expected shape (3, 6, 1) or (6, 1), got shape (5, 1)"),
        (lambda: MODEL(FUNCTION[0], POINTS), "function: expected a tensor (B, N, channels), got float32…"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
