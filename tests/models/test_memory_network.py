"""The end-to-end memory network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import MemoryNetwork, MemoryNetworkConfig
from attnbook.models.memory_network import position_weights
from helpers import complains, tokens

SMALL = {"vocab_size": 13, "memory_size": 6, "width": 8}
VARIANTS = {
    "adjacent": MemoryNetworkConfig(**SMALL),
    "layerwise": MemoryNetworkConfig(**SMALL, tying="layerwise", hops=2),
    "bag of words": MemoryNetworkConfig(**SMALL, position_encoding=False, hops=1),
}
STORY, QUESTION = tokens(4, 6, 5, low=1, high=13), tokens(4, 3, low=1, high=13, seed=1)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_formula_counts_the_parameters(config):
    assert sum(p.numel() for p in MemoryNetwork(config).parameters()) == config.num_parameters()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_shapes_and_gradients(config):
    model = MemoryNetwork(config)
    logits, weights = model(STORY, QUESTION, return_weights=True)
    assert logits.shape == (4, 13)
    assert weights.shape == (4, config.hops, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, config.hops))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_one_hop_is_what_the_paper_writes():
    model = MemoryNetwork(VARIANTS["bag of words"])
    A, C = (table.weight for table in model.embeddings)
    time = torch.arange(5, -1, -1)  # the last sentence has time 0
    m = A[STORY].sum(2) + model.times[0][time]
    c = C[STORY].sum(2) + model.times[1][time]
    u = A[QUESTION].sum(1)
    p = torch.softmax(torch.einsum("be,bse->bs", u, m), -1)
    expected = (u + torch.einsum("bs,bse->be", p, c)) @ C.T
    torch.testing.assert_close(model(STORY, QUESTION), expected)


def test_words_are_weighed_by_their_places():
    weights = position_weights(torch.tensor([[5, 6, 0], [7, 0, 0]]), 4)
    j, k = 1 / 2, 3 / 4  # first of two words, third of four axes
    assert weights[0, 0, 2].item() == pytest.approx((1 - j) - k * (1 - 2 * j))
    assert weights[1, 0, 0].item() == pytest.approx(0 - 1 / 4 * -1)  # the only word: j/J = 1
    model = MemoryNetwork(VARIANTS["adjacent"])
    swapped = STORY[:, :, [1, 0, 2, 3, 4]]
    assert not torch.allclose(model(STORY, QUESTION), model(swapped, QUESTION), atol=1e-4)
    bag = MemoryNetwork(VARIANTS["bag of words"])
    torch.testing.assert_close(bag(STORY, QUESTION), bag(swapped, QUESTION))


@pytest.mark.parametrize("linear", [False, True])
def test_padding_changes_nothing(linear):
    model = MemoryNetwork(VARIANTS["adjacent"])
    with torch.no_grad():
        short = STORY[:, 2:, :3]
        padded = nn.functional.pad(short, (0, 2, 2, 0))  # two words behind, two sentences in front
        expected = model(short, QUESTION, linear=linear)
        torch.testing.assert_close(model(padded, nn.functional.pad(QUESTION, (0, 4)), linear=linear), expected)


def test_an_empty_story_is_no_error():
    logits, weights = MemoryNetwork(VARIANTS["adjacent"])(torch.zeros_like(STORY), QUESTION, return_weights=True)
    assert logits.isfinite().all()
    assert (weights == 0).all()


@pytest.mark.parametrize("name", ["adjacent", "layerwise"])
def test_one_batch_can_be_learned_by_heart(name):
    model, answers = MemoryNetwork(VARIANTS[name]), tokens(4, low=1, high=13, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(STORY, QUESTION), answers)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


MODEL = MemoryNetwork(VARIANTS["adjacent"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MemoryNetworkConfig(**SMALL, hops=0), "hops: expected an integer ≥ 1, got 0"),
        (
            lambda: MemoryNetworkConfig(**SMALL, tying="all"),
            "tying: expected one of 'adjacent', 'layerwise', got 'all'",
        ),
        (lambda: MODEL(STORY[0], QUESTION), "story: expected a tensor (B, S, J), got int64 tensor of shape (6, 5)"),
        (
            lambda: MODEL(tokens(4, 7, 5, high=13), QUESTION),
            "story: expected at most 6 sentences on axis 1, got int64 tensor of shape (4, 7, 5)",
        ),
        (lambda: MODEL(STORY, QUESTION[:2]), "question: expected batch size 4, that of story, got int64…"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
