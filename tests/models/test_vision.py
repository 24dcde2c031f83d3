"""The Vision Transformer and the convolutional baseline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import ConvNet, ConvNetConfig, VisionConfig, VisionTransformer
from helpers import complains, copy_renamed, count_parameters, hugging_face, learn, published, reach_all, tokens

SMALL = {"image_size": 12, "patch_size": 4, "channels": 2, "width": 16, "depth": 2, "num_heads": 4}
VARIANTS = {
    "published": VisionConfig(**SMALL, num_classes=5),
    "plain": VisionConfig(**SMALL, num_classes=5, pool="mean", position="sinusoidal", hidden=24),
    "mixed": VisionConfig(**SMALL, position="sinusoidal", first_norm=True, patch_bias=False, activation="swiglu"),
    "bare": VisionConfig(**SMALL, pool="mean"),
}
# How Hugging Face's names become ours.
BLOCK = {
    r"layernorm_before|layer_norm1": "attention_norm",
    r"layernorm_after|layer_norm2": "feed_forward_norm",
    r"mlp\.fc1": "feed_forward.up",
    r"mlp\.fc2": "feed_forward.down",
    r"\bo_proj": "out_proj",
}
VIT = {
    r"^vit\.": "",
    r"embeddings\.cls_token": "token",
    r"embeddings\.position_embeddings": "position",
    r"embeddings\.patch_embeddings": "patches",
    r"^layers": "blocks",
    **BLOCK,
    r"^layernorm": "norm",
    r"^classifier": "head",
}


@pytest.mark.parametrize(
    ("patch_size", "width", "depth", "heads", "count"),
    [(16, 768, 12, 12, 86_567_656), (32, 768, 12, 12, 88_224_232), (16, 1024, 24, 16, 304_326_632)],
    ids=["B/16", "B/32", "L/16"],
)
def test_published_configurations_have_their_number_of_parameters(patch_size, width, depth, heads, count):
    config = VisionConfig(224, patch_size, 3, width, depth, heads, num_classes=1000)
    assert config.num_parameters() == count
    transformers = hugging_face()
    made = transformers.ViTConfig(
        patch_size=patch_size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=1000,
    )  # fmt: skip
    with torch.device("meta"):
        assert count_parameters(VisionTransformer(config)) == count
        assert count_parameters(transformers.ViTForImageClassification(made)) == count


@torch.no_grad()
def test_the_outputs_are_hugging_faces():
    transformers = hugging_face()
    config = transformers.ViTConfig(
        image_size=12, patch_size=4, num_channels=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    theirs = published(lambda: transformers.ViTForImageClassification(config))
    ours = VisionTransformer(VisionConfig(**SMALL, hidden=24, num_classes=5, norm_eps=1e-12))
    copy_renamed(ours, theirs, VIT)
    image = torch.randn(3, 2, 12, 12)
    expected = theirs(image, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(ours(image), expected.logits, atol=1e-5, rtol=1e-5)
    features, trace = ours.features(image, return_trace=True)
    for mine, other in zip(trace.hidden[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    for mine, other in zip(trace.weights, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(features, theirs.vit(image).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_formula_counts_the_parameters(config):
    assert count_parameters(VisionTransformer(config)) == config.num_parameters()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_shapes_types_and_gradients(config):
    model, image = VisionTransformer(config), torch.randn(3, 2, 12, 12)
    output = model(image)
    assert output.shape == (3, config.num_classes or 16)
    assert model.features(image).shape == (3, 9 + (config.pool == "class"), 16)
    reach_all(model, (output * torch.randn_like(output)).sum())
    assert model.bfloat16()(image.bfloat16()).dtype == torch.bfloat16


def test_without_positions_a_mean_over_patches_sees_a_bag():
    model = VisionTransformer(VARIANTS["bare"]).eval()
    image = torch.randn(1, 2, 12, 12)
    moved = image.roll(4, 2)  # by a patch
    assert not torch.allclose(model(image), model(moved), atol=1e-5)
    nn.init.zeros_(model.position)
    torch.testing.assert_close(model(image), model(moved), atol=1e-6, rtol=1e-5)


def test_positions_on_the_grid_are_most_like_their_own_row_and_column():
    similarity = VisionTransformer(
        VisionConfig(**{**SMALL, "image_size": 20}, position="sinusoidal")
    ).position_similarity()
    assert similarity.shape == (5, 5, 5, 5)
    map_of_centre = similarity[2, 2]
    assert map_of_centre.flatten().argmax() == 12
    assert map_of_centre[2, 4] > map_of_centre[4, 4]
    torch.testing.assert_close(similarity.flatten(2).flatten(0, 1).diagonal(), torch.ones(25))


@pytest.mark.parametrize("name", ["published", "plain"])
def test_one_batch_can_be_learned_by_heart(name):
    model, image, label = VisionTransformer(VARIANTS[name]), torch.randn(8, 2, 12, 12), tokens(8, high=5)
    assert learn(model, lambda: nn.functional.cross_entropy(model(image), label), steps=60) < 0.1


def test_the_baseline_counts_learns_and_shrinks_the_image():
    config = ConvNetConfig(2, 5, (8, 12))
    model, image, label = ConvNet(config), torch.randn(8, 2, 12, 13), tokens(8, high=5)
    assert count_parameters(model) == config.num_parameters()
    assert model.features(image).shape == (8, 12, 6, 6)
    assert model(image).shape == (8, 5)
    reach_all(model, nn.functional.cross_entropy(model(image), label))
    assert learn(model, lambda: nn.functional.cross_entropy(model(image), label), steps=80, lr=3e-2) < 0.1


def test_the_baseline_knows_a_shifted_image():
    model = ConvNet(ConvNetConfig(1, 5, (8, 12))).eval()
    image = torch.zeros(1, 1, 24, 24)
    image[:, :, 8:12, 8:12] = torch.randn(4, 4)
    torch.testing.assert_close(model(image), model(image.roll((2, 4), (2, 3))))


MODEL = VisionTransformer(VARIANTS["published"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: VisionConfig(**{**SMALL, "depth": 0}), "depth: expected an integer ≥ 1, got 0"),
        (lambda: VisionConfig(**SMALL, num_classes=0), "num_classes: expected an integer ≥ 1, got 0"),
        (lambda: VisionConfig(**SMALL, pool="max"), "pool: expected one of 'class', 'mean', got 'max'"),
        (lambda: VisionConfig(**SMALL, position="rotary"), "position: expected one of …, got 'rotary'"),
        (lambda: VisionConfig(**SMALL, activation="tanh"), "activation: expected one of …, got 'tanh'"),
        (
            lambda: VisionConfig(**{**SMALL, "patch_size": 5}),
            "patch_size: expected a divisor of image_size = 12, got 5",
        ),
        (
            lambda: VisionTransformer(VisionConfig(**{**SMALL, "num_heads": 3})),
            "num_heads: expected a divisor of embed_dim = 16, got 3",
        ),
        (
            lambda: MODEL(torch.zeros(1, 2, 12, 8)),
            "image: expected (B, channels, rows, columns) with (2, 12, 12) behind B, got shape (1, 2, 12, 8)",
        ),
        (
            lambda: MODEL(torch.zeros(1, 2, 12, 12, dtype=torch.uint8)),
            "image: expected a float64 or float32 or float16 or bfloat16 tensor, got uint8 tensor …",
        ),
        (lambda: MODEL.pool(torch.zeros(3, 16)), "features: expected a tensor (B, L, E), got …"),
        (lambda: ConvNetConfig(1, 5, ()), "widths: expected at least one stage, got ()"),
        (lambda: ConvNetConfig(1, 5, (4, 0)), "widths: expected an integer ≥ 1, got 0"),
        (
            lambda: ConvNet(ConvNetConfig(1, 5))(torch.zeros(1, 1, 3, 8)),
            "image: expected at least 4 rows and columns, got float32 tensor of shape (1, 1, 3, 8)",
        ),
        (
            lambda: ConvNet(ConvNetConfig(1, 5))(torch.zeros(1, 3, 8, 8)),
            "image: expected (B, channels, rows, columns) with (1, 8, 8) behind B, got shape (1, 3, 8, 8)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
