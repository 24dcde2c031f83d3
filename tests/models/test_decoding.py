"""The lean way to decode: equal to the full pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.cache import PagedCache, SinkCache, StaticCache
from attnbook.models import Decoder, DecoderConfig, Decoding, generate
from helpers import complains, tokens

SMALL = {"vocab_size": 11, "context_length": 12, "width": 16, "depth": 2, "num_heads": 4}
VARIANTS = {
    **{name: DecoderConfig(**SMALL, position=name) for name in ("learned", "sinusoidal", "rotary", "none")},
    "llama": DecoderConfig.llama(*SMALL.values(), num_kv_heads=2),
    "bare": DecoderConfig(**SMALL, bias=False, tie=False, activation="relu", norm="rms", hidden=20),
}
KINDS = {"static": StaticCache, "paged": PagedCache}


def shaken(config):
    """Make a model none of whose parameters is where it starts, biases and gains included."""
    model = Decoder(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_single_tokens_give_what_the_full_pass_gives(config, kind):
    model, text = shaken(config).eval(), tokens(3, 12, high=11)
    quick = Decoding(model)
    caches = quick.make_cache(3, kind=kind)
    parts = [quick(text[:, :4], caches)] + [quick(text[:, i : i + 1], caches) for i in range(4, 12)]
    with torch.no_grad():
        expected = model(text)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_padding_gives_what_each_row_gives_alone(config):
    model, text = shaken(config).double().eval(), tokens(3, 9, high=11)
    padding = torch.tensor([0, 3, 5])
    for reader in (model, Decoding(model)):
        caches = model.make_cache(3)
        with torch.no_grad():
            parts = [reader(text[:, :6], caches, padding=padding)]
            parts += [reader(text[:, i : i + 1], caches, padding=padding) for i in range(6, 9)]
            for row, first in enumerate(padding.tolist()):
                alone = model(text[row : row + 1, first:])
                assert torch.allclose(torch.cat(parts, 1)[row, first:], alone[0], atol=1e-9)


def test_sinks_and_windows_are_as_the_model_has_them():
    model, text = shaken(VARIANTS["llama"]).double().eval(), tokens(2, 25, high=11)
    quick = Decoding(model)
    ours, theirs = (model.make_cache(2, 7, kind=SinkCache, sinks=2) for _ in range(2))
    with torch.no_grad():
        for i in range(25):
            token = text[:, i : i + 1]
            assert torch.allclose(quick(token, ours), model(token, theirs), atol=1e-9)


def test_it_takes_the_models_place_in_generate():
    model = shaken(VARIANTS["learned"]).train()
    for options in ({"temperature": 0}, {"top_k": 3}):
        drawn = [
            generate(
                reader, tokens(2, 3, high=11), max_new_tokens=10, generator=torch.Generator().manual_seed(0), **options
            )
            for reader in (model, Decoding(model))
        ]
        assert torch.equal(*drawn)
    assert model.training


def test_the_weights_are_copied():
    model = shaken(VARIANTS["bare"]).eval()
    quick = Decoding(model)
    before = quick(tokens(1, 1, high=11), quick.make_cache(1))
    with torch.no_grad():
        model.blocks[0].attention.q_proj.weight.zero_()
        model.blocks[0].feed_forward.down.weight.zero_()
    assert torch.equal(quick(tokens(1, 1, high=11), quick.make_cache(1)), before)


def test_onednn_is_left_as_it_was():
    quick = Decoding(shaken(VARIANTS["learned"]))
    assert torch.backends.mkldnn.enabled
    quick(tokens(1, 1, high=11), quick.make_cache(1))
    assert torch.backends.mkldnn.enabled


def other_normalizer():
    model = Decoder(DecoderConfig(5, 4, 8, 1, 2))
    model.blocks[0].attention.normalizer = "sparsemax"
    return model


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Decoding(nn.Linear(1, 1)), "model: expected a Decoder, got Linear"),
        (lambda: Decoding(other_normalizer()), "model: expected a Decoder whose attention is softmax, got …"),
        (
            lambda: Decoder(DecoderConfig(5, 4, 8, 1, 2))(tokens(2, 2, high=5), padding=torch.tensor([1])),
            "padding: expected batch size 2, that of tokens, got int64 tensor of shape (1,)",
        ),
        (
            lambda: Decoder(DecoderConfig(5, 4, 8, 1, 2))(tokens(2, 2, high=5), padding=torch.tensor([0.5, 1])),
            "padding: expected a int64 or int32 tensor, got float32 tensor of shape (2,)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
