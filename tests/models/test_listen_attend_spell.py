"""Listen, Attend and Spell, and its baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from attnbook.models import CTCRecogniser, ListenAttendSpell, ListenerConfig, greedy_decode
from helpers import complains, tokens

CONTENT = ListenerConfig(channels=5, vocab_size=7, width=16, pyramid=2)
LOCATION = replace(CONTENT, location_filters=3, location_kernel=5, pyramid=1)
BOTH = pytest.mark.parametrize("config", [CONTENT, LOCATION], ids=["content", "location"])
SOUND = torch.randn(3, 5, 22, generator=torch.Generator().manual_seed(0))
TEXT = tokens(3, 6, high=7)


@BOTH
def test_the_formula_counts_the_parameters(config):
    assert sum(p.numel() for p in ListenAttendSpell(config).parameters()) == config.num_parameters()
    assert sum(p.numel() for p in CTCRecogniser(config).parameters()) == config.num_parameters(attention=False)


@BOTH
def test_shapes_and_gradients(config):
    model = ListenAttendSpell(config)
    logits, weights = model.forward_with_weights(SOUND, TEXT)
    assert logits.shape == (3, 6, 7)
    assert weights.shape == (3, 6, 22 // 2**config.pyramid)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name != "key.bias":  # adds the same to all scores of a query
            assert parameter.grad.abs().max() > 0, name


@BOTH
def test_text_is_causal_and_hears_everything(config):
    model = ListenAttendSpell(config).double()
    sound = SOUND[..., :20].double().requires_grad_()
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(sound, TEXT)
    heard, *read = torch.autograd.grad(
        logits[:, 2].square().sum(), (sound, *embedded), allow_unused=True, materialize_grads=True
    )
    assert (heard.abs().sum(1) > 0).all()
    assert [bool((g != 0).any()) for g in read] == [True] * 3 + [False] * 3


@BOTH
def test_padding_changes_nothing(config):
    model = ListenAttendSpell(config).eval()
    padded = torch.cat([SOUND[:, :, :16], torch.full((3, 5, 8), 9.0)], -1)
    lengths = torch.full((3,), 16)
    with torch.no_grad():
        short, short_weights = model.forward_with_weights(SOUND[:, :, :16], TEXT)
        logits, weights = model.forward_with_weights(padded, TEXT, lengths)
    places = short_weights.shape[-1]
    assert (weights[..., places:] == 0).all()
    torch.testing.assert_close(weights[..., :places], short_weights)
    torch.testing.assert_close(logits, short)


def test_each_layer_of_the_pyramid_halves_the_frames():
    for pyramid, places in ((0, 22), (1, 11), (2, 5), (3, 2)):
        model = ListenAttendSpell(replace(CONTENT, pyramid=pyramid))
        assert model.listener(SOUND)[0].shape == (3, places, 16)
        assert model.listener(SOUND, torch.tensor([22, 9, 17]))[1].tolist() == [n // 2**pyramid for n in (22, 9, 17)]


def test_location_aware_attention_knows_where_it_looked():
    # Frames all alike: content cannot tell them apart, the last weights can.
    sound = torch.ones(1, 5, 20)
    for config, moves in ((CONTENT, False), (LOCATION, True)):
        model = ListenAttendSpell(config).eval()
        state = model.encode(sound)
        places = state.weights.shape[1]
        state = state._replace(memory=torch.ones_like(state.memory))
        with torch.no_grad():
            found = [model.attend(torch.ones(1, 16), state._replace(weights=torch.eye(places)[[i]]))[1] for i in (1, 3)]
        assert torch.allclose(*found) != moves


def test_location_features_follow_the_weights():
    model = ListenAttendSpell(LOCATION).eval()
    state = model.encode(torch.ones(1, 5, 40))
    state = state._replace(memory=torch.ones_like(state.memory))
    with torch.no_grad():
        first, second = (
            model.attend(torch.ones(1, 16), state._replace(weights=torch.eye(20)[[i]]))[1] for i in (7, 10)
        )
    torch.testing.assert_close(first[:, 2:13], second[:, 5:16])  # looked three later: the same, three later


@BOTH
def test_one_batch_can_be_learned_by_heart(config):
    model = ListenAttendSpell(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(70):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(SOUND, TEXT[:, :-1]).flatten(0, 1), TEXT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_greedy_decoding_takes_the_best_letter_each_time():
    model, lengths = ListenAttendSpell(LOCATION).eval(), torch.tensor([22, 20, 14])
    found = greedy_decode(model, SOUND, start=0, end=6, max_length=4, lengths=lengths)
    for row, text in enumerate(found.tolist()):
        with torch.no_grad():
            logits = model(SOUND[[row], :, : lengths[row]], torch.tensor([[0, *text[:-1]]]))[0]
        real = text.index(6) + 1 if 6 in text else len(text)
        assert logits.argmax(-1).tolist()[:real] == text[:real]


def test_the_baseline_learns_one_batch_and_reads_it_back():
    model, lengths = CTCRecogniser(LOCATION), torch.tensor([22, 20, 14])
    text, letters = torch.tensor([[1, 1, 2], [3, 0, 0], [4, 5, 0]]), torch.tensor([3, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(SOUND, text, letters, lengths)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert model.transcribe(SOUND, lengths) == [[1, 1, 2], [3], [4, 5]]
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_baseline_cannot_say_more_letters_than_it_hears_frames():
    model = CTCRecogniser(CONTENT)  # 22 frames leave 5 annotations
    assert model.loss(SOUND, TEXT, torch.full((3,), 6)).isinf()


MODEL = ListenAttendSpell(CONTENT)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replace(CONTENT, width=15), "width: expected an even integer, got 15"),
        (lambda: replace(CONTENT, pyramid=-1), "pyramid: expected an integer ≥ 0, got -1"),
        (lambda: replace(CONTENT, location_kernel=4), "location_kernel: expected an odd integer, got 4"),
        (lambda: MODEL(SOUND[:, :4], TEXT), "spectrogram: expected 5 channels on axis 1, got float32…"),
        (lambda: MODEL(SOUND[..., :3], TEXT), "spectrogram: expected at least 4 frames on axis 2, got float32…"),
        (
            lambda: MODEL(SOUND, TEXT, torch.tensor([22, 23, 1])),
            "lengths: expected between 4 and 22 frames, got 1 to 23",
        ),
        (lambda: MODEL(SOUND, TEXT, torch.tensor([22])), "lengths: expected shape (3,), got shape (1,)"),
        (lambda: MODEL(SOUND, TEXT[:2]), "target: expected batch size 3, that of spectrogram, got int64…"),
        (lambda: MODEL(SOUND, TEXT.float()), "target: expected a int64 or int32 tensor, got float32…"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
