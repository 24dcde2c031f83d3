"""The recurrent memory Transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnbook.models import RecurrentMemoryConfig, RecurrentMemoryTransformer
from attnbook.models.recurrent_memory import memory_mask
from attnbook.train import token_loss
from helpers import complains, tokens

SMALL = RecurrentMemoryConfig(vocab_size=11, segment_length=4, memory_tokens=2, width=16, depth=2, num_heads=2)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, memory_tokens=0), replace(SMALL, hidden=24)])
def test_the_formula_counts_the_parameters(config):
    assert sum(p.numel() for p in RecurrentMemoryTransformer(config).parameters()) == config.num_parameters()


def test_who_sees_whom():
    assert memory_mask(1, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    mask = memory_mask(2, 3)
    assert mask[:2].sum() == 4
    assert mask[-2:].all()


def test_shapes_and_gradients():
    model = RecurrentMemoryTransformer(SMALL)
    logits, memory = model(tokens(3, 10, high=11), return_memory=True)  # two segments and a half
    assert logits.shape == (3, 10, 11)
    assert memory.shape == (3, 2, 16)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("m", [0, 2])
def test_earlier_segments_are_seen_through_the_memory_alone(m):
    model = RecurrentMemoryTransformer(replace(SMALL, memory_tokens=m)).double()
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(tokens(2, 12, high=11))
    for i in range(12):
        found = torch.autograd.grad(
            logits[:, i].square().sum(), embedded, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        seen = torch.cat(found, 1).abs().sum((0, 2)) > 0
        assert not seen[i + 1 :].any()
        first = 0 if m else i // 4 * 4
        assert seen[first : i + 1].all()
        assert not seen[:first].any()


def test_a_text_may_be_read_in_parts():
    model, text = RecurrentMemoryTransformer(SMALL).eval(), tokens(2, 12, high=11)
    with torch.no_grad():
        first, memory = model(text[:, :8], return_memory=True)
        assert torch.allclose(torch.cat([first, model(text[:, 8:], memory)], 1), model(text), atol=1e-6)


@pytest.mark.parametrize(("unroll", "reached"), [(0, [2]), (1, [1, 2]), (2, [0, 1, 2]), (None, [0, 1, 2])])
def test_the_gradient_goes_back_over_as_many_hand_overs_as_asked_for(unroll, reached):
    model = RecurrentMemoryTransformer(replace(SMALL, unroll=unroll))
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(tokens(2, 12, high=11))
    found = torch.autograd.grad(logits[:, -1].square().sum(), embedded, allow_unused=True, materialize_grads=True)
    assert [i for i, gradient in enumerate(found) if gradient.abs().sum() > 0] == reached


def test_a_token_of_the_first_segment_can_be_recalled_in_the_third():
    # Two texts that differ in their first token alone; the answer, at the very end, repeats it.
    model = RecurrentMemoryTransformer(SMALL)
    text = tokens(1, 12, low=3, high=11).repeat(2, 1)
    text[:, 0] = torch.tensor([1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(text)[:, -1], text[:, 0])
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    without = RecurrentMemoryTransformer(replace(SMALL, memory_tokens=0))
    assert torch.equal(*without(text)[:, -1])  # no memory: the two texts look the same


def test_one_batch_can_be_learned_by_heart():
    model, text = RecurrentMemoryTransformer(SMALL), tokens(3, 11, high=11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = token_loss(model, (text[:, :-1], text[:, 1:]))
        loss.backward()
        optimizer.step()
    assert loss < 0.1


MODEL = RecurrentMemoryTransformer(SMALL)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replace(SMALL, memory_tokens=-1), "memory_tokens: expected an integer ≥ 0, got -1"),
        (lambda: replace(SMALL, unroll=True), "unroll: expected an integer ≥ 0, got True"),
        (lambda: MODEL(tokens(3, high=11)), "tokens: expected a tensor (B, L), got int64 tensor of shape (3,)"),
        (
            lambda: MODEL(tokens(1, 4, high=11), torch.zeros(1, 3, 16)),
            "memory: expected shape (1, 2, 16), got float32 tensor of shape (1, 3, 16)",
        ),
        (
            lambda: MODEL.read_segment(tokens(1, 5, high=11), torch.zeros(1, 2, 16)),
            "tokens: expected at most 4 positions, got int64 tensor of shape (1, 5)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
