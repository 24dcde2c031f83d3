"""The encoder–decoder Transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.layers import MultiHeadAttention
from attnbook.models import Transformer, count, greedy_decode
from attnbook.models.transformer import POSITIONS
from attnbook.positions import sinusoidal
from attnbook.train import sequence_loss
from helpers import complains, count_parameters, tokens


def padded(lengths=(6, 3, 1), high=9):
    """Return sources (B, S) of these lengths, padded with 0."""
    source = tokens(len(lengths), max(lengths), high=high, low=1)
    for row, length in zip(source, lengths, strict=True):
        row[length:] = 0
    return source


@pytest.fixture(
    params=[(p, n) for p in POSITIONS for n in (True, False)], ids=lambda p: f"{p[0]}-{'pre' if p[1] else 'post'}"
)
def model(request):
    position, norm_first = request.param
    return Transformer(9, 7, 8, 2, 2, max_length=12, position=position, norm_first=norm_first).double().eval()


@pytest.mark.parametrize(("norm_first", "norms"), [(True, 2), (False, 0)])
def test_the_formula_counts_the_parameters(norm_first, norms):
    model = Transformer(9, 7, 8, 3, 2, hidden=20, norm_first=norm_first)
    encoder = count.block(8, 20)
    decoder = encoder + count.attention(8, 2) + 16  # a second attention and its norm
    embeddings, output = (9 + 7) * 8, count.linear(8, 7)
    assert count_parameters(model) == embeddings + 3 * (encoder + decoder) + norms * 16 + output


def test_decode_step_agrees_with_forward(model):
    source, target = padded(), tokens(3, 5, high=7)
    logits = model(source, target)
    assert logits.shape == (3, 5, 7)
    with torch.no_grad():
        state = model.encode(source)
        for t in range(5):
            step, state = model.decode_step(target[:, t], state)
            assert torch.allclose(step, logits[:, t], atol=1e-12)


def test_padding_changes_nothing(model):
    source, target = padded(), tokens(3, 4, high=7)
    wide = torch.cat([source, torch.zeros(3, 4, dtype=torch.int64)], 1)
    logits = model(source, target)
    assert torch.allclose(logits, model(wide, target), atol=1e-12)
    for row, length in enumerate((6, 3, 1)):
        alone = model(source[row : row + 1, :length], target[row : row + 1])
        assert torch.allclose(alone[0], logits[row], atol=1e-12)


def test_causality_by_gradient(model):
    embedded = []
    model.target_embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(padded(), tokens(3, 6, high=7))
    for i in range(6):
        (gradient,) = torch.autograd.grad(logits[:, i].square().sum(), embedded[0], retain_graph=True)
        assert (gradient[:, i + 1 :] == 0).all()
        assert (gradient[:, : i + 1].abs().sum(-1) > 0).all()


def test_every_parameter_gets_a_finite_gradient(model):
    model(padded(), tokens(3, 6, high=7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_source_of_padding_alone_gives_finite_outputs(model):
    source = padded((4, 2))
    source[1] = 0
    logits = model(source, tokens(2, 3, high=7))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_greedy_decode_is_the_argmax_of_forward(model):
    source = padded()
    found = greedy_decode(model, source, start=1, end=2, max_length=6)
    inputs = torch.cat([torch.ones(3, 1, dtype=torch.int64), found[:, :-1]], 1)
    best = model(source, inputs).argmax(-1)
    for row, expected in zip(found.tolist(), best.tolist(), strict=True):
        end = row.index(2) + 1 if 2 in row else len(row)
        assert row[:end] == expected[:end]


def test_the_encoder_sees_both_ways_and_the_order_where_it_has_positions(model):
    source = padded((5,))
    changed = source.clone()
    changed[0, 4] = source[0, 4] % 8 + 1
    assert not torch.allclose(model.encode(source).memory[:, 0], model.encode(changed).memory[:, 0])
    swapped = source[:, [1, 0, 3, 2, 4]]
    same = torch.allclose(
        model.encode(source).memory.sort(1).values, model.encode(swapped).memory.sort(1).values, atol=1e-9
    )
    assert same == (model.position.abs().sum() == 0 and model.encoder[0].attention.rotary is None)


def test_embeddings_are_scaled_and_positions_added():
    model = Transformer(9, 7, 16, 1, 2, max_length=12).eval()
    seen = []
    model.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    source = padded((5,))
    model.encode(source)
    assert torch.allclose(seen[0], model.source_embedding(source) * 4 + sinusoidal(12, 16)[:5])
    assert Transformer(9, 7, 16, 1, 2, embedding_scale=1.0).scale == 1


def test_the_published_form_equals_pytorchs():
    ours = Transformer(9, 7, 8, 2, 2, hidden=16, norm_first=False).eval()
    theirs = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True, norm_first=False).eval()
    theirs.encoder.norm = theirs.decoder.norm = None
    theirs.encoder.use_nested_tensor = False

    for mine, other in zip(
        (*ours.encoder, *ours.decoder), (*theirs.encoder.layers, *theirs.decoder.layers), strict=True
    ):
        mine.attention.load_state_dict(MultiHeadAttention.from_torch(other.self_attn).state_dict())
        if mine.cross is not None:
            mine.cross.load_state_dict(MultiHeadAttention.from_torch(other.multihead_attn).state_dict())
        mine.feed_forward.up.load_state_dict(other.linear1.state_dict())
        mine.feed_forward.down.load_state_dict(other.linear2.state_dict())
    source, target = padded(), tokens(3, 5, high=7)
    pad = source == 0
    with torch.no_grad():
        expected = ours.output(
            theirs(
                ours._embed("source", source, ours.source_embedding),
                ours._embed("target", target, ours.target_embedding),
                tgt_mask=~torch.ones(5, 5, dtype=torch.bool).tril(),
                src_key_padding_mask=pad,
                memory_key_padding_mask=pad,
            )
        )
        assert torch.allclose(ours(source, target), expected, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_one_batch_can_be_learned_by_heart(position):
    model = Transformer(9, 9, 24, 1, 2, max_length=12, position=position)
    source = padded((6, 5, 4, 3))
    inputs = torch.cat([torch.ones(4, 1, dtype=torch.int64), source[:, :-1]], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = sequence_loss()(model, (source, inputs, source))
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_dropout_acts_in_training_only():
    model = Transformer(9, 7, 8, 1, 2, dropout=0.5)
    source, target = padded(), tokens(3, 4, high=7)
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


MODEL = Transformer(9, 7, 8, 1, 2, max_length=5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Transformer(0, 7, 8, 1, 2), "source_vocab: expected an integer ≥ 1, got 0"),
        (lambda: Transformer(9, 0, 8, 1, 2), "target_vocab: expected an integer ≥ 1, got 0"),
        (lambda: Transformer(9, 7, 0, 1, 2), "width: expected an integer ≥ 1, got 0"),
        (lambda: Transformer(9, 7, 8, 0, 2), "depth: expected an integer ≥ 1, got 0"),
        (lambda: Transformer(9, 7, 8, 1, 0, position="rotary"), "num_heads: expected an integer ≥ 1, got 0"),
        (lambda: Transformer(9, 7, 8, 1, 3), "num_heads: expected a divisor of embed_dim = 8, got 3"),
        (lambda: Transformer(9, 7, 8, 1, 2, max_length=0), "max_length: expected an integer ≥ 1, got 0"),
        (lambda: Transformer(9, 7, 8, 1, 2, position="learned"), "position: expected one of …, got 'learned'"),
        (lambda: Transformer(9, 7, 8, 1, 2, activation="tanh"), "activation: expected one of …, got 'tanh'"),
        (lambda: Transformer(9, 7, 8, 1, 2, dropout=1.0), "dropout: expected a number in [0, 1), got 1.0"),
        (lambda: MODEL.encode(tokens(3, high=9)), "source: expected a tensor (B, L), got int64 tensor of shape (3,)"),
        (lambda: MODEL.encode([[1, 2]]), "source: expected a tensor (B, L), got list"),
        (lambda: MODEL.encode(tokens(1, 6, high=9)), "source: expected at most max_length = 5 positions, got 6"),
        (
            lambda: MODEL(tokens(1, 3, high=9), tokens(1, 6, high=7)),
            "target: expected at most max_length = 5 positions, got 6",
        ),
        (
            lambda: MODEL(tokens(2, 3, high=9), tokens(3, 3, high=7)),
            "target: expected batch size 2, that of source, got int64 tensor of shape (3, 3)",
        ),
        (
            lambda: MODEL(tokens(2, 3, high=9), tokens(2, high=7)),
            "target: expected a tensor (B, L), got int64 tensor of shape (2,)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
