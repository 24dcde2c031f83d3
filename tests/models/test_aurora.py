"""The small Aurora."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnbook.models import Aurora, AuroraConfig
from attnbook.models.aurora import from_windows, level_features, shifted_mask, to_windows
from helpers import complains

SMALL = AuroraConfig(
    surface=2,
    atmosphere=3,
    levels=(250.0, 500.0, 850.0, 1000.0),
    grid=(8, 16),
    patch=2,
    latents=3,
    width=16,
    depth=2,
    num_heads=2,
)
DRAW = torch.Generator().manual_seed(0)
SURFACE, AIR = torch.randn(2, 2, 8, 16, generator=DRAW), torch.randn(2, 3, 4, 8, 16, generator=DRAW)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, depth=1, hidden=20, latents=1, window=(1, 4, 2))])
def test_the_formula_counts_the_parameters(config):
    assert sum(p.numel() for p in Aurora(config).parameters()) == config.num_parameters()


def test_shapes_and_gradients():
    model = Aurora(SMALL)
    surface, air = model(SURFACE, AIR)
    assert surface.shape == SURFACE.shape
    assert air.shape == AIR.shape
    ((surface - SURFACE).square().sum() + (air - AIR).square().sum()).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_patches_and_windows_come_back_together():
    model = Aurora(SMALL)
    patches = model._patches(AIR.transpose(1, 2))
    assert patches.shape == (2, 4, 32, 12)
    assert torch.equal(patches[1, 2, 9], AIR[1, :, 2, 2:4, 2:4].flatten())  # row 1, column 1 of 4 by 8 patches
    assert torch.equal(model._fields(patches, 3), AIR.transpose(1, 2))
    volume = torch.arange(2 * 4 * 6 * 8).view(2, 4, 6, 8, 1)
    windows = to_windows(volume, (2, 3, 4))
    assert windows.shape == (2 * 2 * 2 * 2, 24, 1)
    assert torch.equal(windows[3, :, 0], volume[0, :2, 3:, 4:].flatten())
    assert torch.equal(from_windows(windows, (2, 3, 4), (4, 6, 8)), volume)


def test_columns_meet_over_the_ends_and_rows_and_levels_do_not():
    mask = shifted_mask((4, 4, 4), (2, 2, 2), (1, 1, 1))
    where = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4)).view(1, 4, 4, 4, 3)
    windows = to_windows(where.roll((-1, -1, -1), (1, 2, 3)), (2, 2, 2))  # (8, 8, 3)
    apart = (windows[:, :, None] - windows[:, None]).abs()
    assert torch.equal(mask, (apart[..., :2] <= 1).all(-1))
    assert (apart[mask][:, 2] == 3).any()  # columns 3 and 0


def reach(model, row, column):
    """Say which points of the surface the forecast at one point depends on."""
    surface = SURFACE.double().requires_grad_()
    output, _ = model.double()(surface, AIR.double())
    (gradient,) = torch.autograd.grad((output - surface)[0, :, row, column].square().sum(), surface)
    return gradient[0].abs().sum(0) > 0


def test_shifted_windows_go_around_the_earth_but_not_over_the_poles():
    seen = reach(Aurora(SMALL), 0, 0)
    assert seen[:4, 0].all()  # its own window
    assert seen[:, 12:].any()  # columns at the other end, through the shifted windows
    assert not seen[4:].any()  # rows at the other end
    assert not reach(Aurora(replace(SMALL, depth=1)), 0, 0)[:, 4:].any()  # nothing outside without a shift


def test_levels_may_be_named_in_any_order():
    model, order = Aurora(SMALL).double(), [2, 0, 3, 1]
    other = Aurora(replace(SMALL, levels=tuple(SMALL.levels[i] for i in order))).double()
    other.load_state_dict(model.state_dict())
    surface, air = model(SURFACE.double(), AIR.double())
    again, reordered = other(SURFACE.double(), AIR.double()[:, :, order])
    torch.testing.assert_close(again, surface)
    torch.testing.assert_close(reordered, air[:, :, order])


def test_a_model_may_read_other_levels_than_it_was_made_for():
    model = Aurora(SMALL)
    other = Aurora(replace(SMALL, levels=(300.0, 700.0)))
    other.load_state_dict(model.state_dict())  # pressures are no parameters
    assert other(SURFACE, AIR[:, :, :2])[1].shape == (2, 3, 2, 8, 16)
    features = level_features(torch.tensor([250.0, 500.0, 250.0]), 8)
    assert torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], features[1])


def test_rolling_out_is_stepping():
    model = Aurora(SMALL).eval()
    with torch.no_grad():
        states = model.roll_out(SURFACE, AIR, steps=3)
        assert len(states) == 3
        for (surface, air), (before, air_before) in zip(states, [(SURFACE, AIR), *states[:2]], strict=True):
            assert torch.equal(surface, model(before, air_before)[0])
            assert torch.equal(air, model(before, air_before)[1])


def test_one_batch_can_be_learned_by_heart():
    model = Aurora(replace(SMALL, grid=(4, 8), width=32))
    surface, air = SURFACE[:, :, :4, :8], AIR[:, :, :, :4, :8]
    later, air_later = surface.roll(1, -1), air.roll(1, -1)  # the wind blows everything one column on
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        found, air_found = model(surface, air)
        loss = (found - later).square().mean() + (air_found - air_later).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # to say that nothing changes costs about 4


MODEL = Aurora(SMALL)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replace(SMALL, latents=0), "latents: expected an integer ≥ 1, got 0"),
        (lambda: replace(SMALL, width=15), "width: expected an even integer, got 15"),
        (
            lambda: replace(SMALL, levels=(0.0, 500.0)),
            "levels: expected at least one pressure, all of them > 0, got (0.0, 500.0)",
        ),
        (lambda: replace(SMALL, grid=(8, 15)), "grid: expected multiples of patch = 2, got (8, 15)"),
        (
            lambda: replace(SMALL, window=(2, 3, 2)),
            "window: expected divisors of (4, 4, 8), the levels, rows and columns, got (2, 3, 2)",
        ),
        (lambda: MODEL(SURFACE[:, :1], AIR), "surface: expected shape (2, 2, 8, 16), got shape (2, 1, 8, 16)"),
        (
            lambda: MODEL(SURFACE, AIR[:, :, :3]),
            "atmosphere: expected shape (2, 3, 4, 8, 16), got shape (2, 3, 3, 8, 16)",
        ),
        (lambda: MODEL.roll_out(SURFACE, AIR, steps=0), "steps: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
