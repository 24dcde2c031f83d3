"""Speculative decoding: the distribution is the large model's, whatever the draft."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from attnbook.models import Decoder, DecoderConfig, Decoding, accept, generate, speculate
from attnbook.models.generation import keep_top_k
from helpers import complains, tokens


class Markov(nn.Module):
    """A model whose next token depends on the last alone."""

    def __init__(self, seed, vocab=4):
        super().__init__()
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)) * 1.5

    def forward(self, text):
        return self.table[text]


TARGET, DRAFT = Markov(0), Markov(1)


def continuations(table, first, length):
    """Return the probability of every continuation, by the chain rule: (V,) · length."""
    steps = table.softmax(-1)
    joint = steps[first]
    for _ in range(length - 1):
        joint = joint[..., None] * steps.expand(*joint.shape[:-1], *steps.shape)
    return joint.flatten()


def pvalue(drawn, probability):
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probability))
    assert (counts[probability == 0] == 0).all()
    expected = probability.double() / probability.double().sum() * len(drawn)
    rare = expected < 5  # too few for the approximation by χ²: counted together
    pooled = [torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) for x in (counts.double(), expected)]
    return stats.chisquare(*(x[pooled[1] > 0] for x in pooled)).pvalue


def number(text, vocab=4):
    """Number a continuation as :func:`continuations` orders them."""
    found = 0
    for token in text:
        found = found * vocab + token
    return found


@pytest.mark.parametrize("draft", [DRAFT, TARGET, Markov(2)], ids=["other", "itself", "another"])
def test_texts_are_distributed_as_the_models_own(draft, generator):
    drawn = []
    for _ in range(1000):
        found = speculate(TARGET, draft, tokens(1, 1, high=1), max_new_tokens=3, draft_length=2, generator=generator)
        drawn.append(number(found.tokens[0, 1:].tolist()))
    assert pvalue(drawn, continuations(TARGET.table, 0, 3)) > 0.01
    assert pvalue(drawn, continuations(Markov(3).table, 0, 3)) < 1e-6  # the test tells distributions apart


def test_the_tokens_of_plain_sampling_pass_the_same_test(generator):
    text = generate(TARGET, torch.zeros(1000, 1, dtype=torch.int64), max_new_tokens=3, generator=generator)
    assert pvalue([number(row[1:]) for row in text.tolist()], continuations(TARGET.table, 0, 3)) > 0.01


def test_filters_apply_to_both(generator):
    drawn = [
        speculate(TARGET, DRAFT, tokens(1, 1, high=1), max_new_tokens=2, top_k=2, generator=generator).tokens[0, 1:]
        for _ in range(800)
    ]
    table = keep_top_k(TARGET.table, 2)
    assert pvalue([number(text.tolist()) for text in drawn], continuations(table, 0, 2)) > 0.01


def test_the_rule_keeps_as_much_as_the_distributions_share(generator):
    p, q = TARGET.table[0].softmax(-1), DRAFT.table[0].softmax(-1)
    kept, chosen = 0, []
    for _ in range(6000):
        guess = torch.multinomial(q, 1, generator=generator)
        count, following = accept(guess, q[None], torch.stack([p, p]), generator=generator)
        kept += count
        chosen.append(guess.item() if count else following.item())
    assert kept / 6000 == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.02)
    assert pvalue(chosen, p) > 0.01


def test_all_guesses_of_the_model_itself_are_kept():
    found = speculate(TARGET, TARGET, tokens(1, 1, high=4), max_new_tokens=15, draft_length=4)
    assert (found.proposed, found.accepted, found.passes) == (12, 12, 3)  # 4 guesses and one more token each time
    assert found.tokens.shape == (1, 16)


@pytest.mark.parametrize("draft_length", [1, 3, 20])
def test_greedy_texts_are_equal_token_by_token(draft_length):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(11, 24, 16, 2, 2, init_std=0.4))
    draft = Decoder(DecoderConfig.llama(11, 24, 8, 1, 2, init_std=0.4))
    prompt = tokens(1, 4, high=11)
    expected = generate(model, prompt, max_new_tokens=20, temperature=0)
    for large in (model, Decoding(model)):
        found = speculate(large, draft, prompt, max_new_tokens=20, draft_length=draft_length, temperature=0)
        assert torch.equal(found.tokens, expected)
        assert found.passes == 20 - found.accepted
        assert found.accepted < found.proposed


def test_each_token_is_read_once_unless_it_was_guessed_wrongly():
    model, read = Decoder(DecoderConfig(11, 32, 16, 1, 2)), []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    found = speculate(model, Markov(0, 11), tokens(1, 4, high=11), max_new_tokens=20, draft_length=3)
    assert sum(read) == 3 + found.proposed + found.passes
    assert len(read) == found.passes


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": tokens(2, 3, high=4)}, "tokens: expected one row: …, got int64 tensor of shape (2, 3)"),
        (
            {"tokens": tokens(1, 0, high=4)},
            "tokens: expected a tensor (B, L) with no empty axis, got int64 tensor of shape (1, 0)",
        ),
        ({"draft_length": 0}, "draft_length: expected an integer ≥ 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer ≥ 1, got 0"),
        ({"temperature": -1}, "temperature: expected a number ≥ 0, got -1"),
        ({"draft": Markov(0, 3)}, "draft: expected a vocabulary of 4, got 3"),
        (
            {name: Decoder(DecoderConfig(size, 9, 8, 1, 2)) for name, size in (("model", 4), ("draft", 5))},
            "draft: expected a vocabulary of 4, got 5",
        ),
        (
            {"model": Decoder(DecoderConfig(4, 6, 8, 1, 2))},
            "tokens: expected at most 2 with 5 to follow, got int64 tensor of shape (1, 3)",
        ),
    ],
)
def test_bad_arguments_are_named(change, text):
    call = {"model": TARGET, "draft": DRAFT, "tokens": tokens(1, 3, high=3), "max_new_tokens": 5, **change}
    with complains(text):
        speculate(call.pop("model"), call.pop("draft"), call.pop("tokens"), **call)
