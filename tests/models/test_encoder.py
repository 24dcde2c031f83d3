"""The bidirectional encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import Encoder, EncoderConfig, MaskedLanguageHead, mean_pool
from helpers import complains, tokens

SMALL = {"vocab_size": 13, "context_length": 12, "width": 16, "depth": 2, "num_heads": 4}
VARIANTS = {
    "bert": EncoderConfig(**SMALL),
    "bare": EncoderConfig(**SMALL, segments=0, pooler=False, hidden=20),
    "pre-norm": EncoderConfig(**SMALL, norm_first=True, activation="swiglu"),
}


def test_bert_base_has_its_published_number_of_parameters():
    config = EncoderConfig(30522, 512, 768, 12, 12)
    assert config.num_parameters() == 109_482_240  # the paper says 110 M
    with torch.device("meta"):
        assert sum(p.numel() for p in Encoder(config).parameters()) == 109_482_240


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_formula_counts_the_parameters(config):
    model = Encoder(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    parts = [p for name, p in model.named_parameters() if name.startswith(("embedding", "position", "segment"))]
    assert config.num_parameters(embeddings=False) == config.num_parameters() - sum(p.numel() for p in parts)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_token_sees_every_real_token_and_no_padding(config):
    model = Encoder(config).double()
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    states = model(tokens(2, 8, high=13), mask=mask)
    assert states.shape == (2, 8, 16)
    (gradient,) = torch.autograd.grad(states[:, 2].square().sum(), embedded[0])
    reached = gradient.abs().sum(-1) > 0
    assert torch.equal(reached, mask)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_all_parameters(config):
    model = Encoder(config)
    states = model(tokens(2, 8, high=13), segments=tokens(2, 8, high=2) if config.segments else None)
    loss = states.square().sum() + (model.pool(states).sum() if config.pooler else 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):  # softmax does not see it
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_trace_holds_every_state_and_every_weight():
    model = Encoder(VARIANTS["bert"]).eval()
    text, mask = tokens(2, 8, high=13), torch.arange(8) < torch.tensor([[8], [5]])
    states, trace = model(text, mask=mask, return_trace=True)
    assert len(trace.hidden) == 3
    assert len(trace.weights) == 2
    assert trace.cross_weights == ()
    assert torch.equal(trace.hidden[-1], states)
    torch.testing.assert_close(states, model(text, mask=mask))
    assert trace.weights[0].shape == (2, 4, 8, 8)
    assert (trace.weights[0][1, :, :, 5:] == 0).all()


def test_masked_words_can_be_learned_by_heart():
    model = Encoder(VARIANTS["bert"])
    head = MaskedLanguageHead(model)
    assert head.output.weight is model.embedding.weight
    text = tokens(4, 10, low=1, high=13)
    hidden = torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) < 0.3
    parameters = {*model.parameters(), *head.parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        scores = head(model(text.masked_fill(hidden, 0)))
        loss = nn.functional.cross_entropy(scores[hidden], text[hidden])
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_a_sentences_vector_has_length_one_and_knows_no_padding():
    states = torch.randn(3, 5, 4)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    vectors = mean_pool(states, mask)
    mean = states[1, :2].mean(0)
    torch.testing.assert_close(vectors[1], mean / mean.norm())
    torch.testing.assert_close(vectors.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0]))


MODEL = Encoder(VARIANTS["bare"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: EncoderConfig(**{**SMALL, "width": 0}), "width: expected an integer ≥ 1, got 0"),
        (lambda: EncoderConfig(**SMALL, segments=-1), "segments: expected an integer ≥ 0, got -1"),
        (lambda: EncoderConfig(**SMALL, activation="tanh"), "activation: expected one of …, got 'tanh'"),
        (lambda: Encoder(EncoderConfig(**SMALL, norm_eps=0.0)), "norm_eps: expected a number > 0, got 0.0"),
        (lambda: MODEL(tokens(3, high=13)), "tokens: expected a tensor (B, L), got int64 tensor of shape (3,)"),
        (lambda: MODEL(tokens(1, 13, high=13)), "tokens: expected at most 12 positions, got 13"),
        (
            lambda: MODEL(tokens(1, 3, high=13), mask=torch.ones(1, 4, dtype=torch.bool)),
            "mask: expected shape (1, 3), that of tokens, got shape (1, 4)",
        ),
        (
            lambda: MODEL(tokens(1, 3, high=13), mask=torch.ones(1, 3)),
            "mask: expected a bool tensor, got float32 tensor of shape (1, 3)",
        ),
        (
            lambda: MODEL(tokens(1, 3, high=13), segments=tokens(1, 3, high=1)),
            "segments: expected None: this model has no segments, got int64 tensor of shape (1, 3)",
        ),
        (lambda: MODEL.pool(torch.zeros(1, 3, 16)), "pooler: expected a model with pooler=True…"),
        (
            lambda: mean_pool(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
            "mask: expected shape (2, 3), got shape (2, 4)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
