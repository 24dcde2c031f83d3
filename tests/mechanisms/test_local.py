"""Local attention: a window, a Gaussian, and positions that can be learned."""

from __future__ import annotations

import math

import pytest
import torch

import attnbook
from attnbook import masks
from attnbook.mechanisms import local_attention
from attnbook.mechanisms.local import PredictedPositions, local_weights
from helpers import DTYPES, array, assert_close, complains, name_of


def by_hand(scores, positions, half_window, gaussian, mask=None):
    """Compute the weights of one row after another, as Luong's equation 10 is written."""
    weights = torch.zeros_like(scores)
    for i, row in enumerate(scores):
        p = positions[i].item()
        window = [s for s in range(len(row)) if abs(s - p) <= half_window and (mask is None or mask[i, s])]
        total = sum(math.exp(row[s]) for s in window)
        for s in window:
            weight = math.exp(row[s]) / total
            weights[i, s] = weight * math.exp(-((s - p) ** 2) / (2 * (half_window / 2) ** 2)) if gaussian else weight
    return weights


@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("half_window", [0.4, 1, 2.5, 100])
def test_weights_are_those_of_the_formula(half_window, gaussian):
    scores = torch.randn(6, 9, dtype=torch.float64)
    positions = torch.tensor([0.0, 2.3, 4.5, 8.0, 11.0, -0.2], dtype=torch.float64)
    mask = torch.rand(6, 9) < 0.7
    for allowed in (None, mask):
        found = local_weights(scores, positions, half_window=half_window, gaussian=gaussian, mask=allowed)
        assert torch.allclose(found, by_hand(scores, positions, half_window, gaussian, allowed), atol=1e-14)


def test_rows_sum_to_one_less_than_one_or_nothing():
    scores, positions = torch.randn(2, 3, 4, 9), torch.tensor([0.3, 4.2, 7.7, 30.0])
    plain = local_weights(scores, positions, half_window=2, gaussian=False).sum(-1)
    bent = local_weights(scores, positions, half_window=2).sum(-1)
    assert torch.allclose(plain[..., :3], torch.ones(2, 3, 3))
    assert ((bent[..., :3] > 0) & (bent[..., :3] < 1)).all()
    assert (plain[..., 3] == 0).all()
    assert (bent[..., 3] == 0).all()


def test_a_window_over_everything_is_global_attention():
    scores = torch.randn(2, 5, 7)
    found = local_weights(scores, torch.zeros(5), half_window=7, gaussian=False)
    assert torch.equal(found, attnbook.normalizers.softmax(scores))


def test_gradients_reach_scores_and_positions():
    scores = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    positions = (torch.rand(2, 4, dtype=torch.float64) * 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, p: local_weights(z, p, half_window=2.3), (scores, positions))
    (gradient,) = torch.autograd.grad(local_weights(scores, positions, half_window=2.3).sum(), positions)
    assert (gradient != 0).all()


def test_an_empty_window_sends_no_gradient_back():
    scores = torch.randn(2, 5, requires_grad=True)
    positions = torch.tensor([50.0, 1.0], requires_grad=True)
    local_weights(scores, positions, half_window=1).square().sum().backward()
    assert (scores.grad[0] == 0).all()
    assert positions.grad.isfinite().all()


def test_predicted_positions_stay_inside_the_source():
    predict = PredictedPositions(6, 4)
    found = predict(torch.randn(3, 5, 6) * 10, torch.tensor([1, 7, 20]))
    assert found.shape == (3, 5)
    assert (found >= 0).all()
    assert (torch.tensor([1, 7, 20]) >= found.T).all()
    found.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in predict.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5), (1, 8)], ids=name_of)
def test_without_gaussian_it_is_masked_attention(lengths, dtype):
    L, S = lengths
    q, k, v = (torch.randn(2, h, n, d).to(dtype).requires_grad_() for h, n, d in ((4, L, 6), (2, S, 6), (2, S, 3)))
    for is_causal in (False, True):
        found = local_attention(q, k, v, half_window=2, gaussian=False, is_causal=is_causal)
        window = masks.relative_positions(L, S).abs() <= 2
        assert found.dtype == dtype
        arrays = [array(x) for x in (q, k, v)]
        assert_close(found, attnbook.reference.attention(*arrays, attn_mask=window, is_causal=is_causal))
        grad = torch.randn_like(found)
        expected = attnbook.reference.attention_gradients(*arrays, array(grad), attn_mask=window, is_causal=is_causal)
        for actual, wanted in zip(torch.autograd.grad(found, (q, k, v), grad), expected, strict=True):
            assert_close(actual, wanted, gradient=True)


def test_positions_move_the_window():
    q, k, v = (torch.randn(1, 1, n, 4) for n in (3, 8, 8))
    found = local_attention(q, k, v, positions=torch.full((3,), 6.0), half_window=0.5)
    assert torch.allclose(found, v[:, :, 6:7].expand_as(found))


def test_empty_rows_are_zero_and_inputs_are_unchanged():
    q, k, v = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3] = False
    before = [x.clone() for x in (q, k, v, mask)]
    output = local_attention(q, k, v, attn_mask=mask, half_window=2)
    output.sum().backward()
    assert (output[:, :, 3] == 0).all()
    assert (q.grad[:, :, 3] == 0).all()
    assert all(torch.equal(now, then) for now, then in zip((q, k, v, mask), before, strict=True))


Z, P = torch.zeros(2, 3, 5), torch.zeros(2, 3)
PREDICT = PredictedPositions(4, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: local_weights(Z[0, 0], P, half_window=1),
            "scores: expected a tensor (..., L, S), got float32 tensor of shape (5,)",
        ),
        (
            lambda: local_weights(Z, P.long(), half_window=1),
            "positions: expected a floating tensor, got int64 tensor of shape (2, 3)",
        ),
        (
            lambda: local_weights(Z, torch.zeros(2), half_window=1),
            "positions: expected broadcastable to (..., L) = (2, 3), got float32 tensor of shape (2,)",
        ),
        (
            lambda: local_weights(Z, P * math.nan, half_window=1),
            "positions: expected no NaN, got 6 NaN of 6 elements",
        ),
        (lambda: local_weights(Z, P, half_window=0), "half_window: expected a number > 0, got 0"),
        (lambda: local_weights(Z, P, half_window="1"), "half_window: expected a number > 0, got '1'"),
        (
            lambda: local_weights(Z, P, half_window=1, mask=torch.ones(2, 5)),
            "mask: expected a bool tensor (True = may attend), got float32 tensor of shape (2, 5)",
        ),
        (lambda: PredictedPositions(0, 4), "query_dim: expected an integer ≥ 1, got 0"),
        (lambda: PredictedPositions(4, 0), "hidden_dim: expected an integer ≥ 1, got 0"),
        (
            lambda: PREDICT(torch.zeros(2, 3, 4), torch.zeros(3)),
            "lengths: expected a tensor of shape (2,), got float32 tensor of shape (3,)",
        ),
        (
            lambda: local_attention(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
            "query: expected a tensor (B, H, L, D), got float32 tensor of shape (2, 3, 4)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
