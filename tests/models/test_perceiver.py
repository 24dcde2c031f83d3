"""The Perceiver."""

from __future__ import annotations

import pytest
import torch

from attnbook.mechanisms import perceiver_attention
from attnbook.models import Perceiver, PerceiverConfig
from helpers import complains, copy_renamed, count_parameters, hugging_face, learn, published, reach_all

SMALL = {"input_width": 6, "num_latents": 5, "width": 16, "depth": 2, "num_heads": 4}
VARIANTS = {
    "encoder": PerceiverConfig(**SMALL),
    "asked": PerceiverConfig(**SMALL, cross_heads=2, repeats=2, query_width=8, output_width=3),
    "learned": PerceiverConfig(**SMALL, hidden=20, query_width=8, num_queries=7),
}
RENAMED = {
    r"^embeddings\.": "",
    r"^encoder\.cross_attention": "read",
    r"^encoder\.self_attends": "blocks",
    r"attention\.self\.layernorm1": "attention_norm",
    r"attention\.self\.layernorm2": "memory_norm",
    r"attention\.self\.layernorm": "attention_norm",
    r"attention\.self\.(query|key|value)": lambda m: f"attention.{m[1][0]}_proj",
    r"attention\.output\.dense": "attention.out_proj",
    r"\.layernorm": ".feed_forward_norm",
    r"mlp\.dense1": "feed_forward.up",
    r"mlp\.dense2": "feed_forward.down",
}


def asked(config: PerceiverConfig) -> torch.Tensor | None:
    """Make the queries that a model wants."""
    return torch.randn(3, 4, 8) if config.query_width and not config.num_queries else None


@torch.no_grad()
def test_the_latents_are_hugging_faces():
    transformers = hugging_face()
    config = transformers.PerceiverConfig(
        d_model=6, num_latents=5, d_latents=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=2, cross_attention_shape_for_attention="q", self_attention_widening_factor=4,
        cross_attention_widening_factor=4, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = published(lambda: transformers.PerceiverModel(config))
    ours = copy_renamed(Perceiver(PerceiverConfig(**SMALL, cross_heads=2)), theirs, RENAMED)
    inputs, mask = torch.randn(3, 11, 6), torch.arange(11) < torch.tensor([[11], [7], [1]])
    expected = theirs(inputs=inputs, attention_mask=mask.long(), output_attentions=True)
    latents, weights = ours.encode(inputs, mask=mask, need_weights=True)
    torch.testing.assert_close(latents, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights[0], expected.cross_attentions[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_formula_counts_the_parameters_and_gradients_reach_them(config):
    model = Perceiver(config)
    assert count_parameters(model) == config.num_parameters()
    output = model(torch.randn(3, 11, 6), asked(config))
    reach_all(model, (output * torch.randn_like(output)).sum())


def test_shapes():
    inputs = torch.randn(3, 11, 6)
    assert Perceiver(VARIANTS["encoder"])(inputs).shape == (3, 5, 16)
    assert Perceiver(VARIANTS["asked"])(inputs, torch.randn(3, 9, 8)).shape == (3, 9, 3)
    assert Perceiver(VARIANTS["learned"])(inputs).shape == (3, 7, 8)
    _, weights = Perceiver(VARIANTS["asked"]).encode(inputs, need_weights=True)
    assert [tuple(seen.shape) for seen in weights] == [(3, 2, 5, 11)] * 2
    assert Perceiver(VARIANTS["encoder"]).bfloat16()(inputs.bfloat16()).dtype == torch.bfloat16


def test_a_read_is_the_mechanism_over_projected_latents():
    model = Perceiver(PerceiverConfig(**SMALL, cross_heads=2)).eval()
    part, inputs = model.read.attention, torch.randn(3, 11, 6)
    normed = model.read.memory_norm(inputs)
    q, k, v = (
        projection(x).unflatten(-1, (2, 8)).transpose(-3, -2)
        for projection, x in (
            (part.q_proj, model.read.attention_norm(model.latents)),
            (part.k_proj, normed),
            (part.v_proj, normed),
        )
    )
    read = part.out_proj(perceiver_attention(q, k, v).transpose(1, 2).flatten(2))
    x = model.latents + read
    expected = x + model.read.feed_forward(model.read.feed_forward_norm(x))
    torch.testing.assert_close(model.read(model.latents.expand(3, -1, -1), inputs), expected, atol=1e-6, rtol=1e-5)


def test_the_input_is_a_set_and_padding_is_not_in_it():
    model, inputs = Perceiver(VARIANTS["asked"]).eval(), torch.randn(3, 11, 6)
    queries, order = torch.randn(3, 9, 8), torch.randperm(11)
    output = model(inputs, queries)
    torch.testing.assert_close(model(inputs[:, order], queries), output, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(inputs, queries[:, 4:5]), output[:, 4:5], atol=1e-6, rtol=1e-5)
    mask = torch.arange(11).expand(3, -1) < 6
    torch.testing.assert_close(model(inputs, queries, mask=mask), model(inputs[:, :6], queries), atol=1e-6, rtol=1e-5)


def test_reading_twice_uses_the_same_weights_twice():
    once, twice = Perceiver(PerceiverConfig(**SMALL)), Perceiver(PerceiverConfig(**SMALL, repeats=2))
    twice.load_state_dict(once.state_dict())
    inputs = torch.randn(3, 11, 6)
    x = once.read(once(inputs), inputs)
    for block in once.blocks:
        x = block(x)
    torch.testing.assert_close(twice(inputs), x)


def test_one_batch_can_be_learned_by_heart():
    model = Perceiver(VARIANTS["asked"])
    inputs, queries, wanted = torch.randn(3, 11, 6), torch.randn(3, 4, 8), torch.randn(3, 4, 3)
    assert learn(model, lambda: (model(inputs, queries) - wanted).square().mean(), steps=100, lr=5e-3) < 0.1


ASKED, LEARNED, ENCODER = (Perceiver(VARIANTS[name]) for name in ("asked", "learned", "encoder"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: PerceiverConfig(**{**SMALL, "num_latents": 0}), "num_latents: expected an integer ≥ 1, got 0"),
        (
            lambda: PerceiverConfig(**SMALL, num_queries=3),
            "num_queries: expected None where there is no query_width, got 3",
        ),
        (
            lambda: Perceiver(PerceiverConfig(**SMALL, cross_heads=3)),
            "num_heads: expected a divisor of embed_dim = 16, got 3",
        ),
        (lambda: ENCODER(torch.zeros(3, 11, 5)), "memory: expected last axis 6, got shape (3, 11, 5)"),
        (lambda: ENCODER(torch.zeros(11, 6)), "inputs: expected a tensor (B, S, input_width), got …"),
        (
            lambda: ENCODER(torch.zeros(3, 11, 6), mask=torch.ones(3, 10, dtype=torch.bool)),
            "mask: expected shape (3, 11), that of inputs, got shape (3, 10)",
        ),
        (lambda: ASKED(torch.zeros(3, 11, 6)), "queries: expected a tensor (B, Q, query_width), got None"),
        (
            lambda: LEARNED(torch.zeros(3, 11, 6), torch.zeros(3, 4, 8)),
            "queries: expected None: this model has its own, got …",
        ),
        (
            lambda: ENCODER(torch.zeros(3, 11, 6), torch.zeros(3, 4, 8)),
            "query_width: expected a model with output queries in its configuration, got one without",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
