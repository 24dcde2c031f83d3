"""Text about images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import (
    Captioner,
    Decoder,
    DecoderConfig,
    Perceiver,
    PerceiverConfig,
    VisionConfig,
    VisionTransformer,
    VisualQuestions,
    generate,
)
from helpers import complains, count_parameters, learn, reach_all, tokens

IMAGE = VisionConfig(12, 4, 2, 12, 1, 3, pool="mean")
TEXT = {"vocab_size": 11, "context_length": 10, "width": 16, "depth": 3, "num_heads": 4}
RESAMPLER = PerceiverConfig(12, 4, 8, 1, 2)


def build(name: str) -> Captioner:
    """Make a captioner of one of the kinds."""
    image = VisionTransformer(IMAGE)
    if name == "cross":
        return Captioner(image, Decoder(DecoderConfig(**TEXT, memory_width=12)))
    if name == "gated":
        return Captioner(image, Decoder(DecoderConfig.llama(*TEXT.values())), gated=True, every=2)
    text = Decoder(DecoderConfig(**TEXT))
    return Captioner(image, text, gated=True, resampler=Perceiver(RESAMPLER))


def opened(captioner: Captioner) -> Captioner:
    """Open the gates."""
    for name, parameter in captioner.named_parameters():
        if name.endswith("gates"):
            nn.init.normal_(parameter)
    return captioner


KINDS = ("cross", "gated", "resampled")


@pytest.mark.parametrize("name", KINDS)
def test_the_formula_counts_the_parameters_and_gradients_reach_them(name):
    model = opened(build(name))
    assert count_parameters(model) == model.num_parameters()
    logits = model(torch.randn(3, 2, 12, 12), tokens(3, 10, high=11))
    assert logits.shape == (3, 10, 11)
    reach_all(model, (logits * torch.randn_like(logits)).sum())


@pytest.mark.parametrize("name", KINDS)
def test_words_see_the_whole_image_and_no_later_word(name):
    model = opened(build(name)).double()
    embedded = []
    model.text.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    image = torch.randn(2, 2, 12, 12, dtype=torch.float64, requires_grad=True)
    logits = model(image, tokens(2, 6, high=11))
    for i in range(6):
        found = torch.autograd.grad(logits[:, i].square().sum(), [image, embedded[0]], retain_graph=True)
        assert (found[0].abs().sum(1) > 0).all()
        assert torch.equal((found[1].abs().sum(-1) > 0).all(0), torch.arange(6) <= i)


def test_a_fresh_gated_captioner_is_its_language_model():
    image, text = torch.randn(3, 2, 12, 12), tokens(3, 7, high=11)
    language = Decoder(DecoderConfig(**TEXT)).eval()
    before = language(text)
    model = Captioner(VisionTransformer(IMAGE), language, gated=True).eval()
    assert torch.equal(model(image, text), before)
    assert not torch.allclose(opened(model)(image, text), before, atol=1e-4)


def test_a_wrapped_language_model_can_be_drawn_anew():
    model = opened(build("gated"))
    gates = model.text.blocks[0].reading.gates.clone()
    model.text.reset_parameters()
    assert torch.equal(model.text.blocks[0].reading.gates, gates)
    written = model.text.blocks[1].block.feed_forward.down.weight
    assert written.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)


def test_a_frozen_language_model_stays_as_it_is():
    language = Decoder(DecoderConfig(**TEXT, init_std=0.3)).requires_grad_(False)
    state = {name: x.clone() for name, x in language.state_dict().items()}
    model = Captioner(VisionTransformer(IMAGE), language, gated=True)
    image, text = torch.randn(4, 2, 12, 12), tokens(4, 6, high=11)
    before = nn.functional.cross_entropy(model(image, text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    loss = learn(
        model,
        lambda: nn.functional.cross_entropy(model(image, text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()),
        steps=40,
    )
    assert loss < before / 2
    after = {name.replace(".block.", "."): x for name, x in model.text.state_dict().items() if ".reading." not in name}
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize(("name", "readings", "seen"), [("cross", 3, 9), ("gated", 2, 9), ("resampled", 3, 4)])
def test_the_trace_says_where_each_word_looked(name, readings, seen):
    model = opened(build(name)).eval()
    image, text = torch.randn(2, 2, 12, 12), tokens(2, 7, high=11)
    logits, trace = model(image, text, return_trace=True)
    assert [tuple(weights.shape) for weights in trace.cross_weights] == [(2, 4, 7, seen)] * readings
    torch.testing.assert_close(trace.cross_weights[0].sum(-1), torch.ones(2, 4, 7))
    torch.testing.assert_close(model(image, text), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_captions_can_be_learned_by_heart_and_generated(name):
    model = build(name)
    image, text = torch.randn(3, 2, 12, 12), tokens(3, 6, low=1, high=11)
    text[:, 0] = 0
    loss = learn(
        model,
        lambda: nn.functional.cross_entropy(model(image, text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()),
        steps=50,
    )
    assert loss < 0.2
    with torch.no_grad():
        given = model.eval().given(image)
    assert torch.equal(generate(given, text[:, :1], max_new_tokens=5, temperature=0), text)


@pytest.mark.parametrize("name", ["cross", "gated"])
def test_answers_can_be_learned_by_heart(name):
    model = VisualQuestions(build(name), 5)
    assert count_parameters(model) == model.num_parameters()
    image, question, answer = torch.randn(6, 2, 12, 12), tokens(6, 4, high=11), tokens(6, high=5)
    image[3:], question[3:] = image[:3], question[[1, 2, 0]]  # neither the image nor the question is enough
    assert learn(model, lambda: nn.functional.cross_entropy(model(image, question), answer), steps=60) < 0.1


def test_an_answer_does_not_depend_on_the_padding():
    model = VisualQuestions(build("cross"), 5).eval()
    image, question = torch.randn(3, 2, 12, 12), tokens(3, 8, high=11)
    mask = torch.arange(8) < torch.tensor([[8], [5], [1]])
    scores = model(image, question, mask=mask)
    assert scores.shape == (3, 5)
    for i, length in enumerate((8, 5, 1)):
        alone = model(image[i : i + 1], question[i : i + 1, :length])
        torch.testing.assert_close(scores[i : i + 1], alone, atol=1e-6, rtol=1e-5)


MODEL = build("cross")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: Captioner(VisionTransformer(IMAGE), Decoder(DecoderConfig(**TEXT))),
            "text: expected a Decoder with memory_width=12, got memory_width=None",
        ),
        (
            lambda: Captioner(VisionTransformer(IMAGE), Decoder(DecoderConfig(**TEXT, memory_width=12)), gated=True),
            "text: expected a Decoder with memory_width=None, got memory_width=12",
        ),
        (
            lambda: Captioner(VisionTransformer(IMAGE), Decoder(DecoderConfig(**TEXT)), gated=True, every=0),
            "every: expected an integer ≥ 1, got 0",
        ),
        (
            lambda: MODEL(torch.zeros(2, 2, 12, 12), tokens(3, 4, high=11)),
            "tokens: expected batch size 2, that of image, got int64 tensor of shape (3, 4)",
        ),
        (
            lambda: MODEL(torch.zeros(2, 2, 12, 12), tokens(2, 11, high=11)),
            "tokens: expected at most 10 more positions, got 11",
        ),
        (
            lambda: MODEL(torch.zeros(2, 3, 12, 12), tokens(2, 4, high=11)),
            "image: expected (B, channels, rows, columns) with (2, 12, 12) behind B, got shape (2, 3, 12, 12)",
        ),
        (lambda: VisualQuestions(MODEL, 0), "num_answers: expected an integer ≥ 1, got 0"),
        (
            lambda: VisualQuestions(MODEL, 5)(
                torch.zeros(2, 2, 12, 12), tokens(2, 4, high=11), mask=torch.ones(2, 3, dtype=torch.bool)
            ),
            "mask: expected shape (2, 4), that of tokens, got shape (2, 3)",
        ),
        (
            lambda: VisualQuestions(MODEL, 5)(
                torch.zeros(2, 2, 12, 12), tokens(2, 4, high=11), mask=torch.zeros(2, 4, dtype=torch.bool)
            ),
            "mask: expected a real token in every row, got a row without",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
