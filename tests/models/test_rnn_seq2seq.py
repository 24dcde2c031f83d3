"""Recurrent sequence-to-sequence models, with each score."""

from __future__ import annotations

import pytest
import torch

from attnbook.models import RNNSeq2Seq, count, greedy_decode
from attnbook.models.rnn_seq2seq import SCORES
from attnbook.train import sequence_loss
from helpers import complains, count_parameters, tokens

WITH_ATTENTION = tuple(score for score in SCORES if score != "none")


def padded(lengths=(6, 3, 1), high=9):
    """Return sources (B, S) of these lengths, padded with 0."""
    source = tokens(len(lengths), max(lengths), high=high, low=1)
    for row, length in zip(source, lengths, strict=True):
        row[length:] = 0
    return source


@pytest.fixture(params=SCORES)
def model(request):
    return RNNSeq2Seq(9, 7, 8, score=request.param).double().eval()


def test_the_formula_counts_the_parameters(model):
    def gru(inputs, width):
        return 3 * (count.linear(inputs, width) + count.linear(width, width))

    W, early = 8, model.score_name in ("none", "additive")
    both = (9 + 7) * W + 2 * gru(W, W // 2) + gru(2 * W if early else W, W)
    maps = count.linear(W // 2, W) + count.linear(2 * W, W) + count.linear(W, 7)
    score = {"additive": 2 * W * W + W, "concat": 2 * W * W + W, "general": W * W}.get(model.score_name, 0)
    assert count_parameters(model) == both + maps + score


def test_decode_step_agrees_with_forward(model):
    source, target = padded(), tokens(3, 5, high=7)
    logits, weights = model.forward_with_weights(source, target)
    assert logits.shape == (3, 5, 7)
    assert weights.shape == (3, 5, 6)
    assert torch.equal(model(source, target), logits)
    state = model.encode(source)
    for t in range(5):
        step, state = model.decode_step(target[:, t], state)
        assert torch.allclose(step, logits[:, t], atol=1e-12)
        assert torch.allclose(state.weights, weights[:, t].to(state.weights.dtype), atol=1e-6)


def test_padding_changes_nothing(model):
    source, target = padded(), tokens(3, 4, high=7)
    wide = torch.cat([source, torch.zeros(3, 4, dtype=torch.int64)], 1)
    assert torch.allclose(model(source, target), model(wide, target), atol=1e-12)
    for row, length in enumerate((6, 3, 1)):
        alone = model(source[row : row + 1, :length], target[row : row + 1])
        assert torch.allclose(alone[0], model(source, target)[row], atol=1e-12)


def test_weights_are_a_distribution_over_the_real_positions(model):
    source = padded()
    _, weights = model.forward_with_weights(source, tokens(3, 4, high=7))
    if model.score_name == "none":
        assert (weights == 0).all()
        return
    assert torch.allclose(weights.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    assert (weights[(source == 0)[:, None].expand_as(weights)] == 0).all()
    assert (weights[(source != 0)[:, None].expand_as(weights)] > 0).all()


def test_outputs_do_not_depend_on_later_targets(model):
    source, target = padded(), tokens(3, 5, high=7)
    changed = target.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 7
    assert torch.equal(model(source, target)[:, :3], model(source, changed)[:, :3])


def test_every_parameter_that_acts_gets_a_gradient(model):
    model.train()
    model(padded(), tokens(3, 4, high=7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_source_of_padding_alone_gives_finite_outputs(model):
    source = padded((4, 2))
    source[1] = 0
    logits, weights = model.forward_with_weights(source, tokens(2, 3, high=7))
    assert logits.isfinite().all()
    assert (weights[1] == 0).all()


def test_greedy_decode_is_the_argmax_of_forward(model):
    source = padded()
    found = greedy_decode(model, source, start=1, end=2, max_length=6)
    inputs = torch.cat([torch.ones(3, 1, dtype=torch.int64), found[:, :-1]], 1)
    best = model(source, inputs).argmax(-1)
    for row, expected in zip(found.tolist(), best.tolist(), strict=True):
        end = row.index(2) + 1 if 2 in row else len(row)
        assert row[:end] == expected[:end]
        assert set(row[end:]) <= {2}


def test_the_context_is_what_the_score_says():
    source, target = padded((5, 5)), tokens(2, 1, high=7)
    for score in WITH_ATTENTION:
        model = RNNSeq2Seq(9, 7, 8, score=score).eval()
        state = model.encode(source)
        _, after = model.decode_step(target[:, 0], state)
        # Bahdanau asks with the state before the step, Luong with the one after it.
        query = state.hidden if score == "additive" else after.hidden
        expected = model.score(query[:, None], state.memory).softmax(-1)[:, 0]
        assert torch.allclose(after.weights, expected, atol=1e-6)


def test_decoding_starts_from_the_backward_encoders_last_state():
    model = RNNSeq2Seq(9, 7, 8, score="dot").eval()
    state = model.encode(padded())
    # The backward half has read everything when it stands at the first position.
    assert torch.allclose(state.hidden, torch.tanh(model.bridge(state.memory[:, 0, 4:])))


def test_without_attention_the_source_is_the_last_states_of_both_directions():
    model, other = (RNNSeq2Seq(9, 7, 8, score=score).eval() for score in ("none", "dot"))
    other.load_state_dict(model.state_dict() | {"decoder.weight_ih_l0": other.decoder.weight_ih_l0})
    source = padded()
    states = other.encode(source).memory
    last = torch.stack([row[length - 1, :4] for row, length in zip(states, (6, 3, 1), strict=True)])
    assert torch.allclose(model.encode(source).memory[:, 0], torch.cat([last, states[:, 0, 4:]], -1))


def test_models_differ_in_the_attention_alone():
    size = {score: sum(p.numel() for p in RNNSeq2Seq(9, 7, 8, score=score).parameters()) for score in SCORES}
    early, late = size["none"], size["dot"]
    assert size["additive"] - early == 2 * 8 * 8 + 8
    assert size["concat"] - late == 2 * 8 * 8 + 8
    assert size["general"] - late == 8 * 8
    assert early - late == 3 * 8 * 8  # the context enters the recurrent step


@pytest.mark.parametrize("score", SCORES)
def test_one_batch_can_be_learned_by_heart(score):
    model = RNNSeq2Seq(9, 9, 24, score=score)
    source = padded((6, 5, 4, 3))
    inputs, outputs = torch.cat([torch.ones(4, 1, dtype=torch.int64), source[:, :-1]], 1), source
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = sequence_loss()(model, (source, inputs, outputs))
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_dropout_acts_in_training_only():
    model = RNNSeq2Seq(9, 7, 8, dropout=0.5)
    source, target = padded(), tokens(3, 4, high=7)
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


MODEL = RNNSeq2Seq(9, 7, 8)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RNNSeq2Seq(0, 7, 8), "source_vocab: expected an integer ≥ 1, got 0"),
        (lambda: RNNSeq2Seq(9, 0, 8), "target_vocab: expected an integer ≥ 1, got 0"),
        (lambda: RNNSeq2Seq(9, 7, 0), "width: expected an integer ≥ 2, got 0"),
        (lambda: RNNSeq2Seq(9, 7, 9), "width: expected an even integer, got 9"),
        (lambda: RNNSeq2Seq(9, 7, 8, score="cosine"), "score: expected one of 'none', …, got 'cosine'"),
        (lambda: RNNSeq2Seq(9, 7, 8, dropout=1.0), "dropout: expected a number in [0, 1), got 1.0"),
        (lambda: MODEL.encode(tokens(3, high=9)), "source: expected a tensor (B, S), got int64 tensor of shape (3,)"),
        (
            lambda: MODEL.encode(torch.zeros(2, 3)),
            "source: expected a int64 tensor, got float32 tensor of shape (2, 3)",
        ),
        (
            lambda: MODEL(tokens(2, 3, high=9), tokens(2, high=7)),
            "target: expected a tensor (B, T), got int64 tensor of shape (2,)",
        ),
        (
            lambda: MODEL(tokens(2, 3, high=9), tokens(3, 3, high=7)),
            "target: expected batch size 2, that of source, got int64 tensor of shape (3, 3)",
        ),
        (
            lambda: MODEL(tokens(2, 0, high=9), tokens(2, 3, high=7)),
            "source: expected a tensor (B, S) with no empty axis, got int64 tensor of shape (2, 0)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
