"""Correspondence: patches in frames of their own, and matching by attention to positions."""

from __future__ import annotations

import math

import pytest
import torch

import attnbook
from attnbook.mechanisms import convolutional_spatial_transformer, soft_match
from helpers import array, assert_close, complains


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


def still(B: int, H: int, W: int) -> torch.Tensor:
    """The transformation that changes nothing, at every place."""
    one = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    return one[..., None, None].expand(B, 2, 3, H, W)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_patches_equal_the_specification(kernel_size):
    maps, affine = draw(2, 3, 4, 5), still(2, 4, 5) + 0.5 * draw(2, 2, 3, 4, 5)
    found = convolutional_spatial_transformer(maps, affine, kernel_size=kernel_size)
    expected = attnbook.reference.convolutional_spatial_transformer(array(maps), array(affine), kernel_size=kernel_size)
    assert_close(found, expected, times=4)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_without_a_transformation_a_convolution_follows_as_if_it_had_come_alone(kernel_size):
    maps, filters = draw(2, 3, 6, 7), draw(4, 3, kernel_size, kernel_size)
    patches = convolutional_spatial_transformer(maps, still(2, 6, 7), kernel_size=kernel_size)
    found = torch.nn.functional.conv2d(patches, filters, stride=kernel_size)
    assert_close(found, torch.nn.functional.conv2d(maps, filters, padding=kernel_size // 2), times=10)


def test_a_turn_of_the_image_is_undone_by_a_turn_of_the_patches():
    maps, filters = draw(1, 3, 7, 7), draw(2, 3, 3, 3)
    turned = maps.rot90(1, (2, 3))
    # rot90 carries the pixel at (x, y) to (y, 6 − x): a step (u, v) in the image is the step (v, −u) in the turned one.
    quarter = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)[..., None, None]
    patches = convolutional_spatial_transformer(turned, quarter.expand(1, 2, 3, 7, 7))
    found = torch.nn.functional.conv2d(patches, filters, stride=3)
    plain = torch.nn.functional.conv2d(maps, filters, padding=1)
    assert_close(found, plain.rot90(1, (2, 3)), times=10)
    untouched = torch.nn.functional.conv2d(turned, filters, padding=1)
    assert (untouched - plain.rot90(1, (2, 3))).abs().max() > 1


def test_sampling_equals_torchs():
    maps, affine = draw(2, 3, 5, 6), still(2, 5, 6) + 0.7 * draw(2, 2, 3, 5, 6)
    found = convolutional_spatial_transformer(maps, affine, kernel_size=1)  # one tap: the shift alone
    x = torch.arange(6) + affine[:, 0, 2]
    y = torch.arange(5)[:, None] + affine[:, 1, 2]
    grid = torch.stack([2 * x / 5 - 1, 2 * y / 4 - 1], -1)
    expected = torch.nn.functional.grid_sample(maps, grid, padding_mode="zeros", align_corners=True)
    assert_close(found, expected, times=10)


def test_patches_gradcheck():
    maps, affine = draw(1, 2, 3, 2).requires_grad_(), (still(1, 3, 2) + 0.3 * draw(1, 2, 3, 3, 2)).requires_grad_()
    call = lambda m, a: convolutional_spatial_transformer(m, a, kernel_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, (maps, affine), eps=1e-7)


def test_a_shifted_map_is_matched_by_its_shift():
    target = draw(1, 32, 6, 8)
    source = target.roll((1, -2), (2, 3))  # what stands at (x, y) comes from (x + 2, y − 1)
    found = soft_match(source, target, scale=200.0)
    x, y = torch.arange(8).expand(6, 8), torch.arange(6)[:, None].expand(6, 8)
    assert torch.allclose(found[0, 0], ((x + 2) % 8).double(), atol=1e-6)
    assert torch.allclose(found[0, 1], ((y - 1) % 6).double(), atol=1e-6)


def test_a_large_scale_gives_the_nearest_neighbour_and_a_small_one_the_middle():
    source, target = draw(2, 5, 3, 4), draw(2, 5, 4, 6)
    cosines = torch.nn.functional.cosine_similarity(
        source.flatten(2)[..., :, None], target.flatten(2)[..., None, :], dim=1
    )
    best = cosines.argmax(-1)
    neighbour = torch.stack([best % 6, best // 6], 1).view(2, 2, 3, 4).double()
    assert torch.allclose(soft_match(source, target, scale=1e6), neighbour, atol=1e-6)
    middle = torch.tensor([2.5, 1.5], dtype=torch.float64)[None, :, None, None].expand(2, 2, 3, 4)
    assert torch.allclose(soft_match(source, target, scale=1e-9), middle, atol=1e-6)


def test_masked_places_are_never_matched():
    source, target = draw(2, 5, 3, 4), draw(2, 5, 4, 6)
    mask = torch.rand(2, 4, 6) < 0.5
    mask[1] = False
    found = soft_match(source, target, target_mask=mask)
    assert_close(found, attnbook.reference.soft_match(array(source), array(target), target_mask=array(mask)), times=4)
    assert not found[1].any()
    changed = target.masked_fill(~mask[:, None], 7.0)
    assert torch.equal(soft_match(source, changed, target_mask=mask), found)


def test_matching_gradcheck():
    maps = draw(1, 3, 2, 2).requires_grad_(), draw(1, 3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(soft_match, maps)


MAPS = torch.zeros(2, 3, 4, 5)
BAD_PATCHES = {
    "features: expected a tensor (B, C, H, W), got float32 tensor of shape (3, 4, 5)": {"features": MAPS[0]},
    "affine: expected (B, 2, 3, H, W) = (2, 2, 3, 4, 5), got shape (2, 2, 3, 4, 4)": {
        "affine": torch.zeros(2, 2, 3, 4, 4)
    },
    "affine: expected float32, the type of features, got float64": {"affine": still(2, 4, 5)},
    "affine: expected no NaN, got 240 NaN of 240 elements": {"affine": torch.full((2, 2, 3, 4, 5), math.nan)},
    "kernel_size: expected an integer ≥ 1, got 0": {"kernel_size": 0},
}
BAD_MATCHES = {
    "target: expected (B, C) = (2, 3), those of source, got shape (2, 2, 4, 5)": {"target": MAPS[:, :2]},
    "target: expected float32, the type of source, got float64": {"target": MAPS.double()},
    "source: expected no NaN, got 120 NaN of 120 elements": {"source": MAPS * math.nan},
    "target: expected no NaN, got 120 NaN of 120 elements": {"target": MAPS * math.nan},
    "target_mask: expected broadcastable to (B, H', W') = (2, 4, 5), got bool tensor of shape (2, 4)": {
        "target_mask": torch.ones(2, 4, dtype=torch.bool)
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD_PATCHES.items(), ids=range(len(BAD_PATCHES)))
def test_bad_arguments_of_patches_are_named(text, arguments):
    with complains(text):
        convolutional_spatial_transformer(**{"features": MAPS, "affine": torch.zeros(2, 2, 3, 4, 5), **arguments})


@pytest.mark.parametrize(("text", "arguments"), BAD_MATCHES.items(), ids=range(len(BAD_MATCHES)))
def test_bad_arguments_of_matches_are_named(text, arguments):
    with complains(text):
        soft_match(**{"source": MAPS, "target": MAPS, **arguments})
