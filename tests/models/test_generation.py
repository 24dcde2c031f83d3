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

from attnbook.cache import PagedCache, SinkCache, StaticCache
from attnbook.models import Decoder, DecoderConfig, Decoding, LSTMLanguageModel, generate, greedy_decode, stream
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


PROMPTS = [tokens(n, high=11, seed=n) for n in (4, 1, 3)]


@pytest.mark.parametrize("name", ["learned", "rotary"])
@pytest.mark.parametrize("lean", [False, True], ids=["model", "lean"])
@pytest.mark.parametrize("new", [7, 12], ids=["fits", "too long"])
def test_prompts_of_different_lengths_go_on_as_each_alone(name, lean, new):
    model = MODELS[name]().double()
    reader = Decoding(model) if lean and new == 7 else model
    found = generate(reader, PROMPTS, max_new_tokens=new, temperature=0)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert len(text) == len(prompt) + new
        if new == 7:
            assert torch.equal(text, generate(model, prompt[None], max_new_tokens=new, temperature=0)[0])
        for i in range(len(prompt), len(text)):  # beyond the context, by what was read of the longest
            seen = text[max(0, i - 10 if len(prompt) == 4 else 0) : i][-10:]
            assert text[i] == model(seen[None])[0, -1].argmax()


@pytest.mark.parametrize("kind", [StaticCache, PagedCache, SinkCache])
def test_caches_of_any_kind_can_be_given(kind):
    model = MODELS["rotary"]().double()
    prompt = tokens(2, 3, high=11)
    expected = generate(model, prompt, max_new_tokens=6, temperature=0)
    caches = model.make_cache(2, 8, kind=kind)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, temperature=0, caches=caches), expected)
    assert caches[0].length == 8


def test_a_text_can_be_continued_in_the_caches_that_hold_its_beginning():
    model = MODELS["learned"]().double()
    caches = model.make_cache(2)
    prompt = tokens(2, 3, high=11)
    half = generate(model, prompt, max_new_tokens=3, temperature=0, caches=caches)
    assert caches[0].length == 5
    found = generate(model, half[:, -1:], max_new_tokens=4, temperature=0, caches=caches)
    expected = generate(model, prompt, max_new_tokens=7, temperature=0)
    assert torch.equal(torch.cat([half[:, :-1], found], 1), expected)


def test_a_sink_cache_goes_on_without_end():
    model = Decoder(DecoderConfig.llama(11, 10, 16, 1, 2, init_std=0.5)).double()
    prompt = tokens(1, 12, high=11)  # more than the cache keeps
    caches = model.make_cache(1, 6, kind=SinkCache, sinks=2)
    text = generate(model, prompt, max_new_tokens=20, temperature=0, caches=caches)[0]
    for i in range(12, 32):
        seen = torch.cat([text[:2], text[i - 4 : i]])
        assert text[i] == model(seen[None])[0, -1].argmax()


class Counting(nn.Module):
    """A model that says the number after the last."""

    def forward(self, text):
        return nn.functional.one_hot((text + 1) % 10, 10).float()


class Digits:
    """A tokenizer of the ten digits."""

    def decode(self, row):
        return "".join(map(str, row.tolist()))


def test_stop_tokens_end_each_row_by_itself():
    prompt = torch.tensor([[2], [5], [0]])
    found = generate(Counting(), prompt, max_new_tokens=6, temperature=0, stop_tokens=[7, 4])
    assert found.tolist() == [[2, 3, 4, 4, 4], [5, 6, 7, 7, 7], [0, 1, 2, 3, 4]]
    listed = generate(Counting(), list(prompt), max_new_tokens=6, temperature=0, stop_tokens=[7, 4])
    assert [text.tolist() for text in listed] == [[2, 3, 4], [5, 6, 7], [0, 1, 2, 3, 4]]


def test_stop_strings_may_span_tokens_but_not_the_prompt():
    options = {"temperature": 0, "stop_strings": ["45", "89"], "tokenizer": Digits()}
    found = generate(Counting(), [torch.tensor([2]), torch.tensor([4])], max_new_tokens=9, **options)
    assert [text.tolist() for text in found] == [[2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    found = generate(Counting(), [torch.tensor([2])], max_new_tokens=2, stop_tokens=[4], **options)
    assert found[0].tolist() == [2, 3, 4]


def test_stop_tokens_of_padded_rows_are_counted_from_their_own_beginning():
    model = MODELS["learned"]().double()
    free = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    stop = free[0][6].item()
    for prompt, text, whole in zip(
        PROMPTS, generate(model, PROMPTS, max_new_tokens=6, temperature=0, stop_tokens=[stop]), free, strict=True
    ):
        new = whole[len(prompt) :].tolist()
        assert text.tolist() == whole[: len(prompt) + (new.index(stop) + 1 if stop in new else 6)].tolist()


def test_streaming_hands_over_what_generate_returns():
    model = MODELS["learned"]().train()
    options = {"max_new_tokens": 5, "top_k": 4}
    flow = stream(model, tokens(2, 3, high=11), generator=torch.Generator().manual_seed(0), **options)
    first = next(flow)
    assert first.shape == (2,)
    assert not model.training
    found = torch.stack([first, *flow], 1)
    assert model.training
    expected = generate(model, tokens(2, 3, high=11), generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(found, expected[:, 3:])


def test_a_stream_that_is_closed_leaves_the_mode_as_it_was():
    model = MODELS["learned"]().train()
    flow = stream(model, tokens(1, 3, high=11), max_new_tokens=5)
    next(flow)
    flow.close()
    assert model.training


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


SHORT = MODELS["learned"]()


def used():
    caches = SHORT.make_cache(3)
    generate(SHORT, tokens(3, 2, high=11), max_new_tokens=1, caches=caches)
    return caches


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
        (lambda: generate(Fixed(), [], max_new_tokens=1), "tokens: expected at least one prompt, got none"),
        (
            lambda: generate(Fixed(), [tokens(2, high=6), tokens(0, high=6)], max_new_tokens=1),
            "tokens: expected a tensor (L) with no empty axis, got int64 tensor of shape (0,)",
        ),
        (
            lambda: generate(Fixed(), [tokens(2, high=6), tokens(1, high=6)], max_new_tokens=1),
            "tokens: expected prompts of one length, for a model that takes no padding, got different lengths",
        ),
        (
            lambda: generate(SHORT, tokens(1, 5, high=11), max_new_tokens=4, caches=SHORT.make_cache(1, 7)),
            "tokens: expected at most 4 with 4 to follow in the caches, got int64 tensor of shape (1, 5)",
        ),
        (
            lambda: generate(SHORT, PROMPTS, max_new_tokens=1, caches=used()),
            "caches: expected empty ones, with prompts of different lengths, got 2 positions",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=1, stop_tokens=[6]),
            "stop_tokens: expected tokens below the vocabulary's size, 6, got 6",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=1, stop_tokens=[-1]),
            "stop_tokens: expected an integer ≥ 0, got -1",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=1, stop_strings="a"),
            "stop_strings: expected a list of strings, got a",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=1, stop_strings=[""], tokenizer=Digits()),
            "stop_strings: expected no empty string, got ['']",
        ),
        (
            lambda: generate(Fixed(), tokens(1, 1, high=6), max_new_tokens=1, stop_strings=["a"]),
            "tokenizer: expected an object with decode(tokens), for stop_strings, got None",
        ),
        (
            lambda: stream(Fixed(), tokens(1, 0, high=6), max_new_tokens=1),
            "tokens: expected a tensor (B, L) with no empty axis, got int64 tensor of shape (1, 0)",
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
