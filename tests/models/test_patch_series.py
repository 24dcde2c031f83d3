"""Forecasting of time series from patches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import PatchTST, PatchTSTConfig
from helpers import complains

SMALL = {"lookback": 20, "horizon": 5, "width": 8, "depth": 2, "num_heads": 2, "patch_length": 6, "stride": 3}
SERIES = torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)


@pytest.mark.parametrize("changes", [{}, {"hidden": 12}, {"stride": 6}, {"patch_length": 20}])
def test_the_formula_counts_the_parameters(changes):
    config = PatchTSTConfig(**{**SMALL, **changes})
    assert sum(p.numel() for p in PatchTST(config).parameters()) == config.num_parameters()


@pytest.mark.parametrize(("lookback", "patches"), [(336, 42), (512, 64)])
def test_the_papers_settings_have_the_papers_number_of_patches(lookback, patches):
    # PatchTST/42 and PatchTST/64, with patches of 16 steps at a stride of 8.
    assert PatchTSTConfig(lookback, 96, 128, 3, 16).patches == patches


def test_shapes_and_gradients():
    model = PatchTST(PatchTSTConfig(**SMALL))
    forecast = model(SERIES)
    assert forecast.shape == (4, 5, 3)
    forecast.square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_channels_never_meet():
    model = PatchTST(PatchTSTConfig(**SMALL)).double()
    series = SERIES.double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(series)[..., 1].square().sum(), series)
    assert (gradient[..., [0, 2]] == 0).all()
    assert (gradient[..., 1] != 0).all()  # and every step of its own past counts
    swapped = SERIES[..., [2, 0, 1]].double()
    torch.testing.assert_close(model(swapped), model(SERIES.double())[..., [2, 0, 1]])


def test_a_series_in_other_units_has_its_forecast_in_other_units():
    model = PatchTST(PatchTSTConfig(**SMALL)).double()
    series = SERIES.double()
    torch.testing.assert_close(model(50 * series - 700), 50 * model(series) - 700, rtol=1e-3, atol=1e-2)
    bare = PatchTST(PatchTSTConfig(**SMALL, normalise=False)).double()
    assert not torch.allclose(bare(50 * series - 700), 50 * bare(series) - 700, rtol=1e-3, atol=1e-2)


def test_a_constant_series_stays_finite():
    assert PatchTST(PatchTSTConfig(**SMALL))(torch.full((1, 20, 1), 3.0)).isfinite().all()


def test_one_batch_can_be_learned_by_heart():
    model = PatchTST(PatchTSTConfig(**{**SMALL, "width": 16}))
    target = torch.randn(4, 5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = nn.functional.mse_loss(model(SERIES), target).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(SERIES), target)
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * first


MODEL = PatchTST(PatchTSTConfig(**SMALL))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: PatchTSTConfig(**{**SMALL, "stride": 0}), "stride: expected an integer ≥ 1, got 0"),
        (
            lambda: PatchTSTConfig(**{**SMALL, "patch_length": 21}),
            "patch_length: expected at most lookback = 20, got 21",
        ),
        (
            lambda: PatchTST(PatchTSTConfig(**{**SMALL, "num_heads": 3})),
            "num_heads: expected a divisor of embed_dim = 8, got 3",
        ),
        (lambda: MODEL(SERIES[:, 1:]), "series: expected 20 steps on axis 1, got float32 tensor of shape (4, 19, 3)"),
        (lambda: MODEL(SERIES[0]), "series: expected a tensor (B, steps, C), got float32 tensor of shape (20, 3)"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
