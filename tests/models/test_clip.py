"""The pair of encoders for images and texts."""

from __future__ import annotations

import math

import pytest
import torch

from attnbook.models import CLIP, CLIPConfig, VisionConfig, contrastive_loss
from helpers import complains, copy_renamed, count_parameters, hugging_face, learn, published, reach_all, tokens

IMAGE = VisionConfig(12, 4, 2, 16, 2, 4, norm_eps=1e-5, patch_bias=False, first_norm=True)
TEXT = {"vocab_size": 13, "context_length": 8, "width": 12, "depth": 2, "num_heads": 3, "end": 12, "joint_width": 6}
CONFIG = CLIPConfig(IMAGE, **TEXT)
SIDE = {
    r"encoder\.layers": "blocks",
    r"self_attn": "attention",
    r"layer_norm1": "attention_norm",
    r"layer_norm2": "feed_forward_norm",
    r"mlp\.fc1": "feed_forward.up",
    r"mlp\.fc2": "feed_forward.down",
}
RENAMED = {
    r"^vision_model\.": "image.",
    r"^text_model\.": "text.",
    r"embeddings\.class_embedding": "token",
    r"embeddings\.patch_embedding": "patches.projection",
    r"embeddings\.token_embedding": "embedding",
    r"embeddings\.position_embedding\.weight": "position",
    r"pre_layrnorm": "first_norm",
    r"post_layernorm|final_layer_norm": "norm",
    r"^visual_projection": "image_projection",
    r"^logit_scale": "log_scale",
    **SIDE,
}


def texts(count: int, length: int = 7) -> torch.Tensor:
    """Draw texts of different lengths, the end token after each, zeros behind."""
    drawn = tokens(count, length, low=1, high=12)
    for i, row in enumerate(drawn):
        end = 2 + i % (length - 2)
        row[end], row[end + 1 :] = 12, 0
    return drawn


@pytest.mark.parametrize(("patch_size", "count"), [(32, 151_277_313), (16, 149_620_737)])
def test_published_configurations_have_their_number_of_parameters(patch_size, count):
    assert CLIPConfig.base(patch_size).num_parameters() == count
    transformers = hugging_face()
    with torch.device("meta"):
        config = transformers.CLIPConfig(vision_config={"patch_size": patch_size})
        assert count_parameters(transformers.CLIPModel(config)) == count


@torch.no_grad()
def test_the_outputs_are_hugging_faces():
    transformers = hugging_face()
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 13, "max_position_embeddings": 8, "hidden_size": 12, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 3, "eos_token_id": 12, "hidden_act": "gelu",
        },
        vision_config={
            "image_size": 12, "patch_size": 4, "num_channels": 2, "hidden_size": 16, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu",
        },
        projection_dim=6,
    )  # fmt: skip
    theirs = published(lambda: transformers.CLIPModel(config))
    ours = copy_renamed(CLIP(CONFIG), theirs, RENAMED)
    image, text = torch.randn(3, 2, 12, 12), texts(4)
    expected = theirs(input_ids=text, pixel_values=image)
    torch.testing.assert_close(ours.encode_image(image), expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode_text(text), expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(image, text), expected.logits_per_image, atol=1e-5, rtol=1e-5)
    loss = theirs(input_ids=text[:3], pixel_values=image, return_loss=True).loss
    torch.testing.assert_close(contrastive_loss(ours(image, text[:3])), loss, atol=1e-5, rtol=1e-5)


def test_the_formula_counts_the_parameters_and_gradients_reach_them():
    model = CLIP(CONFIG)
    assert count_parameters(model) == CONFIG.num_parameters()
    reach_all(model, contrastive_loss(model(torch.randn(5, 2, 12, 12), texts(5, 8))))


def test_vectors_have_length_one_and_know_nothing_behind_the_end():
    model, text = CLIP(CONFIG).eval(), texts(5)
    vectors = model.encode_text(text)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(model.encode_image(torch.randn(2, 2, 12, 12)).norm(dim=-1), torch.ones(2))
    other = text.clone()
    other[0, 3:] = 12  # the first end counts
    torch.testing.assert_close(model.encode_text(other), vectors)
    changed = text.clone()
    changed[0, 0] = 1 + changed[0, 0] % 11
    assert not torch.allclose(model.encode_text(changed)[0], vectors[0], atol=1e-4)


def test_the_temperature_starts_where_it_should_and_has_a_floor():
    model = CLIP(CONFIG)
    assert model.scale().item() == pytest.approx(1 / 0.07)
    torch.nn.init.constant_(model.log_scale, 9.0)
    assert model.scale().item() == pytest.approx(100)


def test_the_loss_of_knowing_nothing_is_ln_b_and_of_knowing_all_zero():
    assert contrastive_loss(torch.zeros(7, 7)).item() == pytest.approx(math.log(7))
    assert contrastive_loss(50 * torch.eye(7)).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(3, 3)
    rows = -logits.log_softmax(1).diagonal().mean()
    columns = -logits.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(contrastive_loss(logits), (rows + columns) / 2)


def test_one_batch_can_be_learned_by_heart():
    model, image, text = CLIP(CONFIG), torch.randn(6, 2, 12, 12), texts(6, 8)
    assert learn(model, lambda: contrastive_loss(model(image, text)), steps=60) < 0.1
    similarity = model(image, text)
    assert torch.equal(similarity.argmax(1), torch.arange(6))


MODEL = CLIP(CONFIG)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CLIPConfig(IMAGE, **{**TEXT, "depth": 0}), "depth: expected an integer ≥ 1, got 0"),
        (lambda: CLIPConfig(IMAGE, **{**TEXT, "end": 13}), "end: expected an integer in [0, 12], got 13"),
        (lambda: CLIPConfig(IMAGE, **TEXT, temperature=0.001), "temperature: expected a number ≥ 0.01, got 0.001"),
        (
            lambda: CLIPConfig(VisionConfig(12, 4, 2, 16, 2, 4, num_classes=5), **TEXT),
            "image: expected a configuration with num_classes=None, got 5 classes",
        ),
        (lambda: MODEL.encode_text(tokens(1, 9, high=13)), "tokens: expected at most 8 positions, got 9"),
        (
            lambda: MODEL.encode_text(tokens(2, 3, high=12)),
            "tokens: expected the end token 12 in every row, got a row without",
        ),
        (lambda: contrastive_loss(torch.zeros(2, 3)), "logits: expected as many images as texts, got shape (2, 3)"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
