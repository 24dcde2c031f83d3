"""The recurrent language model."""

from __future__ import annotations

import pytest
import torch

from attnbook.models import LSTMLanguageModel
from attnbook.train import token_loss
from helpers import complains, tokens


@pytest.mark.parametrize("depth", [1, 2])
def test_going_step_by_step_equals_going_at_once(depth):
    model, text = LSTMLanguageModel(11, 8, depth=depth), tokens(2, 7, high=11)
    logits = model(text)
    assert logits.shape == (2, 7, 11)
    state, steps = None, []
    for token in text.split(1, 1):
        step, state = model.step(token, state)
        steps.append(step)
    assert torch.allclose(torch.cat(steps, 1), logits, atol=1e-6)
    _, state = model.step(text[:, :3])
    assert torch.allclose(model(text[:, 3:], state), logits[:, 3:], atol=1e-6)


def test_it_does_not_look_ahead():
    model, text = LSTMLanguageModel(11, 8), tokens(1, 7, high=11)
    changed = text.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    assert torch.equal(model(text)[:, :4], model(changed)[:, :4])


def test_the_embedding_is_the_output_projection():
    model = LSTMLanguageModel(11, 8, depth=2, dropout=0.5)
    assert model.output.weight is model.embedding.weight
    assert model.lstm.dropout == 0.5
    per_layer = 4 * (8 * 8 + 8 * 8 + 2 * 8)
    assert sum(p.numel() for p in model.parameters()) == 11 * 8 + 11 + 2 * per_layer


def test_one_batch_can_be_learned_by_heart():
    model, text = LSTMLanguageModel(11, 32), tokens(4, 13, high=11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = token_loss(model, (text[:, :-1], text[:, 1:]))
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LSTMLanguageModel(0, 8), "vocab_size: expected an integer ≥ 1, got 0"),
        (lambda: LSTMLanguageModel(8, 0), "width: expected an integer ≥ 1, got 0"),
        (lambda: LSTMLanguageModel(8, 8, depth=0), "depth: expected an integer ≥ 1, got 0"),
        (lambda: LSTMLanguageModel(8, 8, depth=2, dropout=1.0), "dropout: expected a number in [0, 1), got 1.0"),
        (
            lambda: LSTMLanguageModel(8, 8)(tokens(3, high=8)),
            "tokens: expected a tensor (B, L), got int64 tensor of shape (3,)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
