"""Swin: windows that shift."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import Swin, SwinConfig
from attnbook.models.swin import SwinBlock
from helpers import complains, copy_renamed, count_parameters, hugging_face, learn, published, reach_all, tokens

SMALL = {"image_size": 24, "patch_size": 2, "channels": 2, "width": 8, "depths": (2, 2), "num_heads": (2, 4)}
CONFIG = SwinConfig(**SMALL, window=3, num_classes=5)
SWIN = {
    r"^swin\.": "",
    r"embeddings\.patch_embeddings": "patches",
    r"embeddings\.norm": "first_norm",
    r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.relative_position_bias\.relative_position_bias_table": (
        r"stages.\1.\2.bias.table"
    ),
    r"encoder\.layers\.(\d+)\.blocks\.(\d+)": r"stages.\1.\2.block",
    r"encoder\.layers\.(\d+)\.downsample\.reduction": r"merges.\1.projection",
    r"encoder\.layers\.(\d+)\.downsample\.norm": r"merges.\1.norm",
    r"layernorm_before": "attention_norm",
    r"layernorm_after": "feed_forward_norm",
    r"mlp\.fc1": "feed_forward.up",
    r"mlp\.fc2": "feed_forward.down",
    r"\bo_proj": "out_proj",
    r"^layernorm": "norm",
    r"^classifier": "head",
}


@pytest.mark.parametrize(
    ("width", "depths", "heads", "count"),
    [
        (96, (2, 2, 6, 2), (3, 6, 12, 24), 28_288_354),  # the paper says 29 M, 50 M and 88 M
        (96, (2, 2, 18, 2), (3, 6, 12, 24), 49_606_258),
        (128, (2, 2, 18, 2), (4, 8, 16, 32), 87_768_224),
    ],
    ids=["T", "S", "B"],
)
def test_published_configurations_have_their_number_of_parameters(width, depths, heads, count):
    config = SwinConfig(224, 4, 3, width, depths, heads, num_classes=1000)
    assert config.num_parameters() == count
    transformers = hugging_face()
    made = transformers.SwinConfig(embed_dim=width, depths=list(depths), num_heads=list(heads), num_labels=1000)
    with torch.device("meta"):
        assert count_parameters(transformers.SwinForImageClassification(made)) == count


@torch.no_grad()
@pytest.mark.parametrize("image_size", [24, 12])
def test_the_outputs_are_hugging_faces(image_size):
    transformers = hugging_face()
    config = transformers.SwinConfig(
        image_size=image_size, patch_size=2, num_channels=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4],
        window_size=3, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    theirs = published(lambda: transformers.SwinForImageClassification(config))
    ours = copy_renamed(Swin(SwinConfig(**{**SMALL, "image_size": image_size}, window=3, num_classes=5)), theirs, SWIN)
    image = torch.randn(3, 2, image_size, image_size)
    expected = theirs.swin(image, output_hidden_states=True)
    grids = ours.features(image)
    torch.testing.assert_close(grids[-1].flatten(1, 2), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.merges[0](grids[0]).flatten(1, 2), expected.hidden_states[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(image), theirs(image).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SwinConfig(**SMALL, window=6, ratio=2)])
def test_the_formula_counts_the_parameters(config):
    assert count_parameters(Swin(config)) == config.num_parameters()


def test_shapes_and_gradients():
    model = Swin(CONFIG)
    image = torch.randn(2, 2, 24, 24)
    assert [tuple(grid.shape) for grid in model.features(image)] == [(2, 12, 12, 8), (2, 6, 6, 16)]
    output = model(image)
    assert output.shape == (2, 5)
    reach_all(model, (output * torch.randn_like(output)).sum())
    assert Swin(SwinConfig(**SMALL, window=3))(image).shape == (2, 16)
    assert model.bfloat16()(image.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_sees_its_window_and_nothing_else(shift):
    block = SwinBlock(8, 2, 6, 3, shift)
    x = torch.randn(1, 6, 6, 8, requires_grad=True)
    for row in range(6):
        for column in range(6):
            (gradient,) = torch.autograd.grad(block(x)[0, row, column].square().sum(), x)
            reached = gradient[0].abs().sum(-1) > 0
            home = [(torch.arange(6) - shift) // 3 == (place - shift) // 3 for place in (row, column)]
            assert torch.equal(reached, home[0][:, None] & home[1])


def test_the_weights_of_a_block_sum_to_one_within_what_was_together():
    block = SwinBlock(8, 2, 6, 3, 1)
    x = torch.randn(2, 6, 6, 8)
    output, weights = block(x, need_weights=True)
    torch.testing.assert_close(output, block(x))
    assert weights.shape == (2 * 4, 2, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 2, 9))
    assert (weights[block.mask.repeat(2, 2, 1, 1).logical_not()] == 0).all()


def test_one_batch_can_be_learned_by_heart():
    model, image, label = Swin(CONFIG), torch.randn(6, 2, 24, 24), tokens(6, high=5)
    assert learn(model, lambda: nn.functional.cross_entropy(model(image), label), steps=40) < 0.1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SwinConfig(**{**SMALL, "width": 0}), "width: expected an integer ≥ 1, got 0"),
        (lambda: SwinConfig(**SMALL, num_classes=0), "num_classes: expected an integer ≥ 1, got 0"),
        (
            lambda: SwinConfig(**{**SMALL, "num_heads": (2,)}),
            "num_heads: expected as many as depths, 2, and at least one, got 1",
        ),
        (lambda: SwinConfig(**{**SMALL, "depths": (2, 0)}), "depths: expected an integer ≥ 1, got 0"),
        (
            lambda: SwinConfig(**{**SMALL, "patch_size": 5}),
            "patch_size: expected a divisor of image_size = 24, got 5",
        ),
        (
            lambda: SwinConfig(**SMALL, window=5),
            "window: expected a divisor of stage 0's grid, 12, or no smaller, got 5",
        ),
        (
            lambda: SwinConfig(**{**SMALL, "image_size": 18}, window=3),
            "image_size: expected one whose grid can be halved after stage 0, got a grid of 9",
        ),
        (
            lambda: SwinBlock(8, 2, 6, 3, 1)(torch.zeros(1, 6, 3, 8)),
            "x: expected (B, rows, columns, E) with a grid of (6, 6), got shape (1, 6, 3, 8)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
