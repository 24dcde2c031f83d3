"""Speech to text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.data.audio import log_mel, mel_filters
from attnbook.models import SpeechConfig, SpeechTransformer
from helpers import complains, tokens

SMALL = SpeechConfig(vocab_size=11, channels=5, frames=10, context_length=9, width=16, depth=2, num_heads=4, hidden=24)
SOUND = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))


def test_the_formula_counts_the_parameters():
    assert sum(p.numel() for p in SpeechTransformer(SMALL).parameters()) == SMALL.num_parameters()


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"), [(384, 4, 6, 39), (512, 6, 8, 74), (768, 12, 12, 244), (1024, 24, 16, 769)]
)
def test_whispers_sizes_are_about_those_of_the_paper(width, depth, heads, millions):
    # Table 1 of the paper, 51,865 tokens. Its figures lie up to 4 % above what the published weights hold.
    count = SpeechConfig(51865, 80, 1500, 448, width, depth, heads).num_parameters()
    assert 0.96 * millions < count / 1e6 < millions


def test_shapes_and_gradients():
    model = SpeechTransformer(SMALL)
    logits = model(SOUND, tokens(2, 6, high=11))
    assert logits.shape == (2, 6, 11)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_text_is_causal_and_hears_everything():
    model = SpeechTransformer(SMALL).double()
    sound = SOUND.double().requires_grad_()
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(sound, tokens(2, 6, high=11))
    heard, read = torch.autograd.grad(logits[:, 2].square().sum(), (sound, embedded[0]))
    assert (heard.abs().sum(1) > 0).all()
    assert (read[:, 3:] == 0).all()
    assert (read[:, :3].abs().sum(-1) > 0).all()


@torch.no_grad()
def test_caches_give_what_the_full_pass_gives():
    model, text = SpeechTransformer(SMALL).eval(), tokens(2, 9, high=11)
    state = model.start(SOUND)
    steps = [model.decode(text[:, i : i + 3], state.memory, caches=state.caches) for i in range(0, 9, 3)]
    torch.testing.assert_close(torch.cat(steps, 1), model(SOUND, text), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_trace_holds_both_attentions():
    model = SpeechTransformer(SMALL).eval()
    memory, heard = model.encode(SOUND, return_trace=True)
    assert len(heard.hidden) == 3
    logits, said = model.decode(tokens(2, 6, high=11), memory, return_trace=True)
    assert [w.shape for w in said.cross_weights] == [(2, 4, 6, 10)] * 2
    torch.testing.assert_close(logits, model(SOUND, tokens(2, 6, high=11)))


def test_one_batch_can_be_learned_by_heart():
    model = SpeechTransformer(SMALL)
    text = tokens(2, 7, high=11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(SOUND, text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_a_tone_lights_up_one_filter():
    times = torch.arange(16_000) / 16_000
    spectrogram = log_mel(torch.sin(2 * torch.pi * 1000 * times), seconds=1.0)
    assert spectrogram.shape == (80, 100)
    loudest = spectrogram.mean(1).argmax().item()
    frequencies = torch.linspace(0, 8000, 201)
    centre = frequencies[mel_filters(80)[loudest].argmax()].item()
    assert centre == pytest.approx(1000, abs=40)
    assert log_mel(torch.zeros(2, 800), seconds=None).shape == (2, 80, 5)


MODEL = SpeechTransformer(SMALL)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SpeechConfig(11, 0, 10, 9, 16, 2, 4), "channels: expected an integer ≥ 1, got 0"),
        (lambda: MODEL.encode(SOUND[:, :4]), "spectrogram: expected 5 channels on axis 1, got float32…"),
        (lambda: MODEL.encode(torch.zeros(1, 5, 22)), "spectrogram: expected at most 20 frames, got float32…"),
        (lambda: MODEL(SOUND, tokens(2, 10, high=11)), "tokens: expected at most 9 more positions, got 10"),
        (lambda: log_mel(torch.zeros(0)), "samples: expected a tensor (..., n) with no empty axis, got float32…"),
        (lambda: log_mel(torch.zeros(9), seconds=0), "seconds: expected a number > 0, or None, got 0"),
        (lambda: mel_filters(0), "channels: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
