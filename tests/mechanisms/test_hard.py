"""Hard attention: what is drawn, and what its gradients are on average."""

from __future__ import annotations

import pytest
import torch

from attnbook.mechanisms import hard_attention
from attnbook.mechanisms.hard import reinforce_surrogate, sample_one_hot, straight_through
from attnbook.normalizers import softmax
from helpers import DTYPES, complains, name_of

KEYS = 5


@pytest.fixture
def case():
    """A small case in which every pick can be tried: scores (1, S), the loss of each pick, values and a target."""
    z = torch.randn(1, KEYS, dtype=torch.float64, requires_grad=True)
    values, target = torch.randn(KEYS, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    return z, (values - target).square().sum(-1) / 2, values, target


def every_pick():
    return torch.eye(KEYS, dtype=torch.float64)[:, None]  # S picks, each (1, S)


def test_frequencies_are_the_weights():
    weights = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20_000, 4)
    picked = sample_one_hot(weights, generator=torch.Generator().manual_seed(0))
    assert ((picked == 0) | (picked == 1)).all()
    assert (picked.sum(-1) == 1).all()
    assert torch.allclose(picked.mean(0), weights[0], atol=0.015)
    assert (picked[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_empty_rows_stay_empty(dtype):
    weights = torch.tensor([[0.0, 0.0], [0.25, 0.75]], dtype=dtype, requires_grad=True)
    picked = sample_one_hot(weights)
    assert picked.dtype == dtype
    assert picked.sum(-1).tolist() == [0, 1]
    assert not picked.requires_grad
    straight_through(weights, picked).sum().backward()
    assert weights.grad.isfinite().all()
    weights.grad = None
    reinforce_surrogate(weights, picked, torch.ones(2, dtype=dtype)).sum().backward()
    assert weights.grad.isfinite().all()
    assert (weights.grad[0] == 0).all()


def test_the_same_generator_draws_the_same():
    weights = softmax(torch.randn(3, 4, 6))
    first, second = (sample_one_hot(weights, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("baseline", [0.0, 2.5])
def test_reinforce_is_unbiased_whatever_the_baseline(case, baseline):
    z, losses, *_ = case
    (true,) = torch.autograd.grad((softmax(z)[0] * losses).sum(), z)
    mean = torch.zeros_like(z)
    for pick, loss, p in zip(every_pick(), losses, softmax(z)[0].detach(), strict=True):
        term = reinforce_surrogate(softmax(z), pick, loss, baseline=baseline)
        mean += p * torch.autograd.grad(term.sum(), z)[0]
    assert torch.allclose(mean, true, atol=1e-14)


def test_straight_through_follows_the_soft_loss_when_it_is_quadratic(case):
    z, _, values, target = case
    (soft,) = torch.autograd.grad((softmax(z) @ values - target).square().sum() / 2, z)
    mean = torch.zeros_like(z)
    for pick, p in zip(every_pick(), softmax(z)[0].detach(), strict=True):
        context = straight_through(softmax(z), pick) @ values
        mean += p * torch.autograd.grad((context - target).square().sum() / 2, z)[0]
    assert torch.allclose(mean, soft, atol=1e-14)


def test_straight_through_passes_the_pick_on_exactly():
    weights = softmax(torch.randn(2, 3, 4))
    picked = sample_one_hot(weights)
    assert torch.equal(straight_through(weights, picked), picked)


def test_the_factor_of_the_surrogate_is_held_constant(case):
    z, *_ = case
    loss = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    baseline = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    reinforce_surrogate(softmax(z), every_pick()[0], loss, baseline=baseline).sum().backward()
    assert loss.grad is None
    assert baseline.grad is None


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=name_of)
def test_hard_attention_returns_values_that_it_may_see(lengths, is_causal):
    L, S = lengths
    q, k = torch.randn(2, 4, L, 3, requires_grad=True), torch.randn(2, 2, S, 3)
    v = torch.arange(S, dtype=torch.float32).view(1, 1, S, 1).expand(2, 2, S, 1) + 1
    output = hard_attention(q, k, v, is_causal=is_causal, generator=torch.Generator().manual_seed(0))
    assert output.shape == (2, 4, L, 1)
    place = output[..., 0].detach() - 1
    assert torch.equal(place, place.round())
    if is_causal:
        assert (place <= (torch.arange(L) + (S - L)).clamp(min=-1)).all()  # −1: nothing was seen
    output.sum().backward()
    assert q.grad.isfinite().all()


def test_hard_attention_is_softmax_attention_on_average():
    q, k, v = (torch.randn(1, 1, n, 3) for n in (2, 5, 5))
    many = hard_attention(*(x.expand(20_000, -1, -1, -1) for x in (q, k, v)))
    expected = softmax(q @ k.transpose(-2, -1) / 3**0.5) @ v
    assert torch.allclose(many.mean(0), expected[0], atol=0.05)


def test_masked_keys_are_never_drawn_and_empty_rows_are_zero():
    q, k, v = (torch.randn(50, 1, 4, 3) for _ in range(3))
    mask = torch.tensor([True, False, True, False]).repeat(4, 1)
    mask[2] = False
    before = [x.clone() for x in (q, k, v, mask)]
    output = hard_attention(q, k, v, attn_mask=mask)
    assert (output[:, :, 2] == 0).all()
    distance = (output[:, 0, [0, 1, 3], None] - v[:, :, [0, 2]]).abs().sum(-1).amin(-1)
    assert (distance == 0).all()
    assert all(torch.equal(now, then) for now, then in zip((q, k, v, mask), before, strict=True))


W = torch.full((2, 3), 1 / 3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sample_one_hot(W - 1), "weights: expected no negative number, got -0.667"),
        (
            lambda: sample_one_hot(W.long()),
            "weights: expected a float64 or … tensor, got int64 tensor of shape (2, 3)",
        ),
        (
            lambda: straight_through(W, W[:1]),
            "picked: expected a tensor of shape (2, 3), that of weights, got float32 tensor of shape (1, 3)",
        ),
        (
            lambda: reinforce_surrogate(W, W, torch.zeros(3)),
            "loss: expected broadcastable to (..., L) = (2,), got float32 tensor of shape (3,)",
        ),
        (
            lambda: reinforce_surrogate(W, W, torch.zeros(2), baseline=torch.zeros(3)),
            "baseline: expected broadcastable to (..., L) = (2,), got float32 tensor of shape (3,)",
        ),
        (
            lambda: hard_attention(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
            "query: expected a tensor (B, H, L, D), got float32 tensor of shape (2, 3, 4)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
