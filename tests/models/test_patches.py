"""Patches and windows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import patches
from attnbook.models.patches import PatchEmbedding, WindowBias, merge_windows, partition_windows
from helpers import complains


def test_each_patch_is_projected_on_its_own():
    embedding, image = PatchEmbedding(2, 6, 3, 5), torch.randn(4, 2, 6, 6)
    embedded = embedding(image)
    assert embedded.shape == (4, 4, 5)
    weight = embedding.projection.weight.flatten(1)
    for i, (row, column) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        patch = image[:, :, row : row + 3, column : column + 3].flatten(1)
        expected = nn.functional.linear(patch, weight, embedding.projection.bias)
        torch.testing.assert_close(embedded[:, i], expected)
    assert PatchEmbedding(2, 6, 3, 5, bias=False).projection.bias is None


def test_positions_on_a_grid_tell_row_and_column_apart():
    table = patches.sinusoidal_grid(3, 4, 8).view(3, 4, 8)
    assert (table[1, :, :4] == table[1, :1, :4]).all()  # a row shares its half
    assert (table[:, 2, 4:] == table[:1, 2, 4:]).all()  # a column the other
    assert len(table.flatten(0, 1).unique(dim=0)) == 12


@pytest.mark.parametrize(("grid", "window"), [((4, 6), (2, 3)), ((4, 4), (4, 4)), ((2, 4, 6), (1, 2, 3)), ((6,), (2,))])
def test_windows_are_cut_and_put_together(grid, window):
    x = torch.randn(3, *grid, 5)
    windows = partition_windows(x, window)
    cells = torch.tensor(window).prod()
    assert windows.shape == (3 * torch.tensor(grid).prod() / cells, cells, 5)
    assert torch.equal(merge_windows(windows, window, grid), x)
    corner = x[(slice(None), *(slice(0, size) for size in window))]
    count = len(windows) // 3
    assert torch.equal(windows[::count], corner.flatten(1, -2))  # each grid's first window is its corner


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((6, 6), (3, 3), (1, 1)), ((4, 6), (2, 3), (0, 1)), ((4, 4), (2, 2), (0, 0)), ((4, 4, 6), (2, 2, 3), (1, 0, 1))],
)
def test_cells_that_were_no_neighbours_do_not_see_each_other(grid, window, shift):
    mask = patches.shifted_window_mask(grid, window, shift)
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(1, *grid, len(grid))
    rolled = places.roll([-by for by in shift], list(range(1, 1 + len(grid))))
    windows = partition_windows(rolled, window)  # (windows, N, axes): where each cell came from
    apart = (windows[:, :, None] - windows[:, None]).abs()
    expected = (apart < torch.tensor(window)).all(-1)
    assert torch.equal(mask[:, 0], expected)


def test_the_windows_bias_depends_on_the_difference_of_positions_only():
    layer = WindowBias(3, (2, 3))
    assert layer.table.shape == (3 * 5, 3)
    bias = layer()
    assert bias.shape == (3, 6, 6)
    places = [(row, column) for row in range(2) for column in range(3)]
    by_difference = {}
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            found = by_difference.setdefault((p[0] - q[0], p[1] - q[1]), bias[:, i, j])
            assert torch.equal(found, bias[:, i, j])
    assert len({tuple(value.tolist()) for value in by_difference.values()}) == 15


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: PatchEmbedding(1, 6, 4, 8), "patch_size: expected a divisor of image_size = 6, got 4"),
        (lambda: PatchEmbedding(0, 6, 3, 8), "channels: expected an integer ≥ 1, got 0"),
        (
            lambda: PatchEmbedding(1, 6, 3, 8)(torch.zeros(2, 3, 6, 6)),
            "image: expected (B, channels, rows, columns) with (1, 6, 6) behind B, got shape (2, 3, 6, 6)",
        ),
        (
            lambda: PatchEmbedding(1, 6, 3, 8)(torch.zeros(6, 6)),
            "image: expected a tensor (B, channels, rows, columns), got float32 tensor of shape (6, 6)",
        ),
        (lambda: patches.sinusoidal_grid(2, 2, 6), "width: expected a multiple of 4, got 6"),
        (
            lambda: partition_windows(torch.zeros(1, 4, 4, 2), (3, 2)),
            "window: expected divisors of the grid (4, 4), got (3, 2)",
        ),
        (
            lambda: partition_windows(torch.zeros(1, 4, 2), (2, 2)),
            "x: expected a tensor (B, axis0, axis1, E), got float32 tensor of shape (1, 4, 2)",
        ),
        (lambda: WindowBias(2, (0, 2)), "window: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
