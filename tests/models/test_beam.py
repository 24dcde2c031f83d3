"""Beam search: with enough beams it is exhaustive, with one it is greedy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from attnbook.cache import PagedCache
from attnbook.models import (
    Decoder,
    DecoderConfig,
    Decoding,
    LSTMLanguageModel,
    RNNSeq2Seq,
    Transformer,
    beam_decode,
    beam_search,
    generate,
    greedy_decode,
)
from helpers import complains, tokens


def shaken(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model.eval()


MODELS = {
    "learned": shaken(Decoder(DecoderConfig(4, 12, 8, 2, 2))),
    "llama": shaken(Decoder(DecoderConfig.llama(4, 12, 8, 2, 2))),
    "short context": shaken(Decoder(DecoderConfig.llama(4, 4, 8, 2, 2))),
    "lstm": shaken(LSTMLanguageModel(4, 8, depth=2)),
}


def score(model, prompt, text, limit):
    """Return the log-probability of a continuation, by reading it whole."""
    total, text = 0.0, list(text)
    for i, token in enumerate(text):
        seen = torch.tensor([prompt + text[:i]])[:, -limit:]
        total += model(seen)[0, -1].log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_enough_beams_find_the_most_probable_of_all(name):
    model, prompt = MODELS[name], tokens(2, 3, high=4)
    found = beam_search(model, prompt, num_beams=16, max_new_tokens=3)
    for row in range(2):
        with torch.no_grad():
            every = {
                text: score(model, prompt[row].tolist(), text, 4 if name == "short context" else 99)
                for text in itertools.product(range(4), repeat=3)
            }
        best = sorted(every, key=every.get, reverse=True)[:5]
        assert [tuple(text) for text in found.tokens[row, :5].tolist()] == best
        assert found.scores[row, :5].tolist() == pytest.approx([every[text] for text in best], abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_is_greedy(name):
    prompt = tokens(3, 3, high=4)
    found = beam_search(MODELS[name], prompt, num_beams=1, max_new_tokens=6)
    expected = generate(MODELS[name], prompt, max_new_tokens=6, temperature=0)
    assert torch.equal(found.tokens[:, 0], expected[:, 3:])


def test_paged_caches_and_the_lean_path_change_nothing():
    model, prompt = MODELS["llama"], tokens(2, 3, high=4)
    expected = beam_search(model, prompt, num_beams=3, max_new_tokens=8)
    caches = model.make_cache(6, 12, kind=PagedCache, page_size=2)
    for found in (
        beam_search(model, prompt, num_beams=3, max_new_tokens=8, caches=caches),
        beam_search(Decoding(model), prompt, num_beams=3, max_new_tokens=8),
    ):
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.allclose(found.scores, expected.scores, atol=1e-4)
    assert len(caches[0].free) > 6 * 6 - 6 * 5  # beams share what they have in common


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_ended_beams_compete_by_the_penalised_score(penalty):
    model, prompt = MODELS["learned"], [1, 2, 0]
    found = beam_search(
        model, torch.tensor([prompt]), num_beams=64, max_new_tokens=3, stop_tokens=[3], length_penalty=penalty
    )
    every = {}
    with torch.no_grad():
        for text in itertools.product(range(4), repeat=3):
            text = text[: text.index(3) + 1] if 3 in text else text
            every[text] = score(model, prompt, text, 99) / ((5 + len(text)) / 6) ** penalty
    best = sorted(every, key=every.get, reverse=True)[:6]
    padded = [(*text, *[3] * (3 - len(text))) for text in best]
    assert [tuple(text) for text in found.tokens[0, :6].tolist()] == padded
    assert found.scores[0, :6].tolist() == pytest.approx([every[text] for text in best], abs=1e-4)


def test_it_stops_when_all_beams_have_ended():
    class Ending(nn.Module):
        def forward(self, text):
            return torch.tensor([0.0, 0.0, 9.0, 8.0]).expand(*text.shape, 4)

    found = beam_search(Ending(), tokens(1, 1, high=4), num_beams=2, max_new_tokens=9, stop_tokens=[2, 3])
    assert found.tokens.tolist() == [[[2], [3]]]


SEQUENCES = {
    "transformer": lambda: Transformer(9, 5, 8, 2, 2, max_length=12),
    "additive": lambda: RNNSeq2Seq(9, 5, 8),
    "dot": lambda: RNNSeq2Seq(9, 5, 8, score="dot"),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_translations(name):
    model, source = shaken(SEQUENCES[name]()), tokens(2, 5, low=1, high=9)
    options = {"start": 1, "end": 2, "max_length": 4}
    greedy = greedy_decode(model, source, **options)
    assert torch.equal(beam_decode(model, source, num_beams=1, **options).tokens[:, 0, : greedy.shape[1]], greedy)
    found = beam_decode(model, source, num_beams=90, **{**options, "max_length": 3})
    for row in range(2):
        every = {}
        for text in itertools.product(range(5), repeat=3):
            text = text[: text.index(2) + 1] if 2 in text else text
            if text not in every:
                target = torch.tensor([[1, *text[:-1]]])
                with torch.no_grad():
                    output = model(source[row : row + 1], target)
                logits = output[0] if isinstance(output, tuple) else output
                every[text] = logits[0].log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum().item()
        best = max(every, key=every.get)
        assert found.tokens[row, 0].tolist() == [*best, *[2] * (3 - len(best))]
        assert found.scores[row, 0].item() == pytest.approx(every[best], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_beams": 0}, "num_beams: expected an integer ≥ 1, got 0"),
        ({"length_penalty": -1}, "length_penalty: expected a number ≥ 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer ≥ 1, got 0"),
        ({"stop_tokens": [4]}, "stop_tokens: expected tokens below the vocabulary's size, 4, got 4"),
    ],
)
def test_bad_arguments_are_named(change, text):
    with complains(text):
        beam_search(MODELS["learned"], tokens(1, 2, high=4), **{"num_beams": 2, "max_new_tokens": 2, **change})
