"""Decoding: which tokens are kept, how they are drawn, and that caches change nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torch import nn

from attnbook.models import Decoder, DecoderConfig, LSTMLanguageModel, generate, greedy_decode
from attnbook.models.generation import keep_nucleus, keep_top_k, temper
from helpers import complains, tokens

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, -3.0])


class Fixed(nn.Module):
    """A model whose next token never depends on anything."""

    def __init__(self, logits=LOGITS):
        super().__init__()
        self.logits = logits

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


# Hundredths: logits that lie closer make probabilities that are equal in float32.
hundredths = st.integers(-1000, 1000).map(lambda n: n / 100)
logit_rows = arrays("float64", st.integers(1, 20), elements=hundredths, unique=True).map(
    lambda row: torch.from_numpy(row).float()
)


@given(logit_rows, st.integers(1, 25))
def test_top_k_keeps_the_k_largest(logits, k):
    kept = keep_top_k(logits, k) > -math.inf
    assert set(kept.nonzero().flatten().tolist()) == set(logits.argsort(descending=True)[:k].tolist())


def test_top_k_keeps_ties_at_the_edge_and_works_row_by_row():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    found = keep_top_k(logits, 2)
    assert found.tolist() == [[3, 1, 1, -math.inf], [-math.inf, -math.inf, 2, 3]]


@given(logit_rows, st.floats(0.01, 1.0))
def test_nucleus_is_the_smallest_set_that_holds_p(logits, p):
    kept = keep_nucleus(logits, p) > -math.inf
    probability = logits.double().softmax(-1)
    order = probability.argsort(descending=True)
    size = int(kept.sum())
    assert kept[order[:size]].all()  # a prefix of the ranking
    assert probability[order[:size]].sum() >= p - 1e-6
    assert size == 1 or probability[order[: size - 1]].sum() < p + 1e-6


def test_nucleus_at_known_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, size in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert (keep_nucleus(logits, p) > -math.inf).sum() == size
    shuffled = logits[[2, 0, 3, 1]]
    assert (keep_nucleus(shuffled, 0.7) > -math.inf).tolist() == [False, True, False, True]


def test_a_nucleus_of_all_keeps_the_least_probable_too():
    logits = torch.tensor([30.0] * 3 + [0.0])
    assert torch.equal(keep_nucleus(logits, 1), logits)


def test_kept_logits_are_unchanged():
    kept = keep_nucleus(LOGITS, 0.8)
    assert torch.equal(kept[kept > -math.inf], LOGITS[kept > -math.inf])
    kept = keep_top_k(LOGITS, 3)
    assert torch.equal(kept[kept > -math.inf], LOGITS[kept > -math.inf])


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "temperature": 1.5}],
    ids=str,
)
def test_samples_follow_the_distribution(options, generator):
    draws = generate(Fixed(), tokens(6000, 1, high=6), max_new_tokens=1, generator=generator, **options)[:, 1]
    logits = temper(LOGITS, options.get("temperature", 1.0))
    logits = keep_top_k(logits, options["top_k"]) if "top_k" in options else logits
    logits = keep_nucleus(logits, options["top_p"]) if "top_p" in options else logits
    probability = logits.softmax(-1)
    counts = draws.bincount(minlength=6)
    assert (counts[probability == 0] == 0).all()
    kept = probability > 0
    expected = probability[kept].double() / probability[kept].double().sum() * 6000
    assert stats.chisquare(counts[kept], expected).pvalue > 0.01


def test_the_generator_alone_decides():
    model = Decoder(DecoderConfig(11, 16, 16, 1, 2))
    draw = lambda seed: generate(  # noqa: E731
        model, tokens(2, 3, high=11), max_new_tokens=9, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


MODELS = {
    "learned": lambda: Decoder(DecoderConfig(11, 10, 16, 2, 2, init_std=0.3)),
    "rotary": lambda: Decoder(DecoderConfig.llama(11, 10, 16, 2, 2, init_std=0.3)),
    "lstm": lambda: LSTMLanguageModel(11, 16, depth=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("new", [1, 5, 8, 20], ids=lambda n: f"{n} new")
def test_greedy_equals_argmax_by_full_recomputation(name, new):
    model = MODELS[name]()
    prompt = tokens(3, 3, high=11)
    found = generate(model, prompt, max_new_tokens=new, temperature=0)
    text, limit = prompt, 10 if name != "lstm" else 1000
    for _ in range(new):
        text = torch.cat([text, model(text[:, -limit:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, text)
    assert torch.equal(found[:, :3], prompt)


def test_each_token_is_read_once_while_all_fit():
    model, read = MODELS["learned"](), []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    generate(model, tokens(1, 3, high=11), max_new_tokens=8)
    assert read == [3, 1, 1, 1, 1, 1, 1, 1]
    read.clear()
    generate(model, tokens(1, 3, high=11), max_new_tokens=9)  # one more does not fit: read anew
    assert read == [3, 4, 5, 6, 7, 8, 9, 10, 10]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training):
    model = Decoder(DecoderConfig(11, 10, 16, 1, 2, dropout=0.5)).train(training)
    first, second = (generate(model, tokens(1, 3, high=11), max_new_tokens=6, temperature=0) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert model.training == training
    with complains("k: expected an integer ≥ 1, got 0"):
        generate(model, tokens(1, 3, high=11), max_new_tokens=1, top_k=0)
    assert model.training == training


def test_no_gradients_are_kept():
    assert not generate(MODELS["lstm"](), tokens(1, 2, high=11), max_new_tokens=2).requires_grad


class Scripted(nn.Module):
    """A sequence-to-sequence model that says what it is told, row by row."""

    def __init__(self, script):
        super().__init__()
        self.script, self.seen = torch.tensor(script), []

    def encode(self, source):
        return SimpleNamespace(step=0)

    def decode_step(self, token, state):
        self.seen.append(token.tolist())
        logits = nn.functional.one_hot(self.script[:, state.step], 10).float()
        return logits, SimpleNamespace(step=state.step + 1)


def test_greedy_decode_stops_at_the_end_and_fills_with_it():
    model = Scripted([[5, 6, 2, 7, 7], [8, 2, 9, 9, 9]])
    found = greedy_decode(model, tokens(2, 4, high=10), start=1, end=2, max_length=5)
    assert found.tolist() == [[5, 6, 2], [8, 2, 2]]
    assert model.seen == [[1, 1], [5, 8], [6, 2]]


def test_greedy_decode_stops_at_the_limit():
    model = Scripted([[5, 6, 7, 8]]).train()
    assert greedy_decode(model, tokens(1, 4, high=10), start=1, end=2, max_length=3).tolist() == [[5, 6, 7]]
    assert model.training


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: temper(LOGITS, 0), "temperature: expected a number > 0, got 0"),
        (lambda: temper(LOGITS, math.nan), "temperature: expected a number > 0, got nan"),
        (lambda: keep_top_k(LOGITS, 0), "k: expected an integer ≥ 1, got 0"),
        (lambda: keep_top_k(LOGITS, 1.5), "k: expected an integer ≥ 1, got 1.5"),
        (lambda: keep_nucleus(LOGITS, 0), "p: expected a number in (0, 1], got 0"),
        (lambda: keep_nucleus(LOGITS, 1.1), "p: expected a number in (0, 1], got 1.1"),
        (
            lambda: generate(Fixed(), tokens(3, high=6), max_new_tokens=1),
            "tokens: expected a tensor (B, L), got int64 tensor of shape (3,)",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 0, high=6), max_new_tokens=1),
            "tokens: expected a tensor (B, L) with no empty axis, got int64 tensor of shape (1, 0)",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=0),
            "max_new_tokens: expected an integer ≥ 1, got 0",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=1, temperature=-1),
            "temperature: expected a number ≥ 0, got -1",
        ),
        (
            lambda: greedy_decode(Scripted([[1]]), tokens(3, high=6), start=1, end=2, max_length=1),
            "source: expected a tensor (B, S), got int64 tensor of shape (3,)",
        ),
        (
            lambda: greedy_decode(Scripted([[1]]), tokens(1, 3, high=6), start=1, end=2, max_length=0),
            "max_length: expected an integer ≥ 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
