"""Sink caches: the first and the last positions are kept, and distances count within the cache."""

from __future__ import annotations

import pytest
import torch

from attnbook.cache import SinkCache
from attnbook.models import Decoder, DecoderConfig
from helpers import complains, tokens

SHAPE = (11, 10, 16, 1, 2)


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("position", ["rotary", "none"])
def test_one_layer_sees_the_first_and_the_last_tokens_as_one_short_text(sinks, position):
    model = Decoder(DecoderConfig(*SHAPE, position=position, init_std=0.5)).double().eval()
    text = tokens(2, 30, high=11)
    caches = model.make_cache(2, 8, kind=SinkCache, sinks=sinks)
    with torch.no_grad():
        found = [model(text[:, :6], caches)[:, -1]]
        found += [model(text[:, i : i + 1], caches)[:, -1] for i in range(6, 30)]
        for i, logits in enumerate(found, 6):
            seen = text[:, :i] if i <= 8 else torch.cat([text[:, :sinks], text[:, i - 8 + sinks : i]], 1)
            assert torch.allclose(logits, model(seen)[:, -1], atol=1e-9)
    assert caches[0].keys.shape[2] == 8


def test_nothing_is_lost_before_the_cache_is_full():
    model = Decoder(DecoderConfig.llama(11, 10, 16, 2, 2)).eval()
    text = tokens(2, 8, high=11)
    caches = model.make_cache(2, 8, kind=SinkCache)
    with torch.no_grad():
        parts = [model(text[:, i : i + 4], caches) for i in (0, 4)]
        assert torch.allclose(torch.cat(parts, 1), model(text), atol=1e-5)


def test_reset_and_reorder_include_the_sinks():
    model = Decoder(DecoderConfig.llama(*SHAPE, init_std=0.5)).double().eval()
    text = tokens(2, 15, high=11)
    with torch.no_grad():
        caches = model.make_cache(2, 8, kind=SinkCache)
        for _ in range(2):
            for i in range(14):
                model(text[:, i : i + 1], caches)
            caches[0].reorder(torch.tensor([1, 0]))
            swapped = model(text[[1, 0], 14:], caches)
            caches[0].reset()
            seen = torch.cat([text[:, :4], text[:, 11:]], 1)
            assert torch.allclose(swapped[[1, 0]], model(seen)[:, -1:], atol=1e-9)


def test_only_a_cache_that_has_dropped_nothing_can_be_shortened():
    cache, x = SinkCache(1, 1, 4, 2, sinks=1), torch.zeros(1, 1, 4, 2)
    cache.update(x, x)
    cache.truncate(2)
    assert cache.length == 2
    for _ in range(3):
        cache.update(x[:, :, :1], x[:, :, :1])
    with complains("length: expected a cache that has dropped nothing yet, got 5 positions seen"):
        cache.truncate(4)


MODEL = Decoder(DecoderConfig(*SHAPE))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SinkCache(1, 1, 4, 2), "max_length: expected an integer > sinks = 4, got 4"),
        (lambda: SinkCache(1, 1, 4, 2, sinks=-1), "sinks: expected an integer ≥ 0, got -1"),
        (
            lambda: SinkCache(1, 1, 6, 2).update(torch.zeros(1, 1, 7, 2), torch.zeros(1, 1, 7, 2)),
            "key: expected at most 6 more positions at once, got 7",
        ),
        (
            lambda: MODEL.make_cache(1, 8, kind=SinkCache),
            "kind: expected a cache that keeps everything, with learned positions, got SinkCache",
        ),
        (
            lambda: Decoder(DecoderConfig.llama(*SHAPE)).make_cache(1, 11, kind=SinkCache),
            "max_length: expected at most the context length, 10, got 11",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
