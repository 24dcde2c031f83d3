"""The universal correspondence network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnbook.models import CorrespondenceConfig, CorrespondenceNetwork
from attnbook.models.correspondence import read_at
from helpers import complains

SMALL = CorrespondenceConfig(channels=1, width=8, features=6, depth=2)
PLAIN = replace(SMALL, transformer=False)
BOTH = pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["transformer", "plain"])
IMAGE = torch.randn(2, 1, 16, 20, generator=torch.Generator().manual_seed(0))
POINTS = torch.tensor([[[2.0, 3], [6, 2], [4, 5.5]], [[3, 3], [5, 4], [7.25, 6]]])


@BOTH
def test_the_formula_counts_the_parameters(config):
    for changed in (config, replace(config, channels=3, depth=4)):
        assert sum(p.numel() for p in CorrespondenceNetwork(changed).parameters()) == changed.num_parameters()


@BOTH
def test_shapes_and_gradients(config):
    model = CorrespondenceNetwork(config)
    features = model.features(IMAGE)
    assert features.shape == (2, 6, 8, 10)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2, 8, 10))
    assert model(IMAGE, IMAGE[..., :12]).shape == (2, 2, 8, 10)
    model.loss(IMAGE, IMAGE.roll(2, -1), POINTS, POINTS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_frame_that_is_the_images_own_changes_nothing():
    turned, plain = CorrespondenceNetwork(SMALL), CorrespondenceNetwork(PLAIN)
    torch.nn.init.zeros_(turned.frame.weight)
    plain.load_state_dict({k: v for k, v in turned.state_dict().items() if not k.startswith("frame")})
    torch.testing.assert_close(turned.features(IMAGE), plain.features(IMAGE))


def test_a_shifted_image_has_shifted_features():
    model = CorrespondenceNetwork(SMALL)
    torch.nn.init.normal_(model.frame.weight, std=0.05)
    wide = torch.cat([IMAGE, IMAGE.flip(2)], -1)
    first, second = model.features(wide), model.features(wide.roll(4, -1))
    torch.testing.assert_close(first[..., 5:-7], second[..., 7:-5], atol=1e-5, rtol=1e-5)  # far from the edges


def test_features_are_read_between_places():
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    ramp = torch.stack([x, y])[None]
    points = torch.tensor([[[0.0, 0], [4, 3], [1.5, 2.25]]])
    torch.testing.assert_close(read_at(ramp, points), points)


def test_the_loss_is_what_the_paper_writes():
    model = CorrespondenceNetwork(PLAIN)
    points = torch.tensor([[[2.0, 3.0]]])
    with torch.no_grad():
        found = model.loss(IMAGE[:1], IMAGE[1:], points, points, margin=1.2, radius=1.0)
        source, target = model.features(IMAGE[:1])[0], model.features(IMAGE[1:])[0]
    own = source[:, 3, 2]
    positive = (own - target[:, 3, 2]).square().sum()
    distances = (own[:, None, None] - target).norm(dim=0)
    for y, x in ((3, 2), (2, 2), (4, 2), (3, 1), (3, 3)):
        distances[y, x] = torch.inf
    expected = 0.5 * (positive + (1.2 - distances.min()).clamp(min=0).square())
    torch.testing.assert_close(found, expected)


def test_one_pair_can_be_learned_by_heart():
    torch.manual_seed(3)
    model = CorrespondenceNetwork(replace(SMALL, width=16, features=12))
    target = IMAGE.flip(-1)  # a mirror: no shift of features will do
    x, y = torch.meshgrid(torch.arange(1.0, 9), torch.arange(1.0, 7), indexing="xy")
    points = torch.stack([x, y], -1).flatten(0, 1).expand(2, -1, -1)
    matches = points.clone()
    matches[..., 0] = 9.5 - points[..., 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def error():
        with torch.no_grad():
            return (read_at(model(IMAGE, target, scale=60.0), points) - matches).norm(dim=-1).median()

    before = error()
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss(IMAGE, target, points, matches)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert error() < 0.75 < before  # pixels of the feature map


MODEL = CorrespondenceNetwork(SMALL)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replace(SMALL, features=0), "features: expected an integer ≥ 1, got 0"),
        (lambda: MODEL.features(IMAGE.repeat(1, 3, 1, 1)), "image: expected 1 channels on axis 1, got float32…"),
        (lambda: MODEL.features(IMAGE[0]), "image: expected a tensor (B, channels, H, W), got float32…"),
        (lambda: MODEL.loss(IMAGE, IMAGE, POINTS[:1], POINTS), "points: expected shape (2, N, 2), got shape (1, 3, 2)"),
        (
            lambda: MODEL.loss(IMAGE, IMAGE, POINTS, POINTS[:, :2]),
            "matches: expected shape (2, 3, 2), that of points, got shape (2, 2, 2)",
        ),
        (
            lambda: MODEL.loss(IMAGE, IMAGE, POINTS, POINTS, radius=99.0),
            "radius: expected a distance that some place of the target exceeds, got 99.0",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
