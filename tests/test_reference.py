"""The specification itself, against sums written out and against PyTorch where it computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attnbook import reference
from helpers import complains

RNG = np.random.default_rng(0)
Q, K, V = RNG.normal(size=(2, 4, 3, 5)), RNG.normal(size=(2, 2, 6, 5)), RNG.normal(size=(2, 2, 6, 7))


def test_attention_written_out():
    output, weights = reference.attention(Q, K, V, return_weights=True)
    for b in range(2):
        for h in range(4):
            for i in range(3):
                e = [np.exp(sum(Q[b, h, i, d] * K[b, h // 2, j, d] for d in range(5)) / 5**0.5) for j in range(6)]
                assert weights[b, h, i] == pytest.approx([x / sum(e) for x in e], abs=1e-15)
                mix = sum(x / sum(e) * V[b, h // 2, j] for j, x in enumerate(e))
                assert output[b, h, i] == pytest.approx(mix, abs=1e-14)


def test_masked_and_causal_positions_get_nothing():
    mask = RNG.random((3, 6)) < 0.5
    mask[1] = False
    output, weights = reference.attention(Q, K, V, attn_mask=mask, is_causal=True, return_weights=True)
    allowed = mask & (np.arange(6) <= np.arange(3)[:, None] + 3)
    assert (weights[..., ~allowed] == 0).all()
    assert (output[:, :, 1] == 0).all()
    assert weights.sum(-1)[:, :, allowed.any(1)] == pytest.approx(1)


def test_attention_agrees_with_pytorch():
    q, k, v = map(torch.from_numpy, (Q, K, V))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)
    np.testing.assert_allclose(reference.attention(Q, K, V, scale=0.3), expected, atol=1e-14)


def test_gradients_agree_with_finite_differences():
    mask = RNG.random((3, 6)) < 0.7
    bias = RNG.normal(size=(4, 3, 6))
    grad = RNG.normal(size=(2, 4, 3, 7))
    options = {"attn_mask": mask, "bias": bias, "is_causal": True, "scale": 0.4}
    found = reference.attention_gradients(Q, K, V, grad, **options)
    inputs = [Q, K, V]
    for place, gradient in enumerate(found):
        assert gradient.shape == inputs[place].shape
        direction = RNG.normal(size=gradient.shape)
        step = 1e-6
        ends = []
        for sign in (1, -1):
            inputs[place] = (Q, K, V)[place] + sign * step * direction
            ends.append((reference.attention(*inputs, **options) * grad).sum())
        inputs[place] = (Q, K, V)[place]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum(), rel=1e-7)


def test_normalizers_of_one_row():
    z = np.array([0.1, 1.1, 0.2])
    e = np.exp(z)
    assert reference.softmax(z) == pytest.approx(e / e.sum())
    assert reference.softmax_off_by_one(z) == pytest.approx(e / (1 + e.sum()))
    assert reference.softmax_off_by_one(np.array([-1000.0, 1000.0])) == pytest.approx([0, 1])
    assert reference.scalable_softmax(z, 2.0) == pytest.approx(3 ** (2 * z) / (3 ** (2 * z)).sum())
    assert reference.sigmoid(z, 5) == pytest.approx(1 / (1 + np.exp(np.log(5) - z)))
    assert reference.sparsemax(z) == pytest.approx([0, 0.95, 0.05])  # threshold 0.15: the two largest, 1.3 − 1 over 2
    assert reference.sparsemax(np.array([0.3, 0.2, 0.1])) == pytest.approx([1 / 3 + 0.1, 1 / 3, 1 / 3 - 0.1])
    assert reference.entmax(np.array([1.0, 1.0])) == pytest.approx([0.5, 0.5])
    assert reference.entmax(np.array([5.0, 0.0])) == pytest.approx([1, 0])
    assert reference.entmax(z, 2.0) == pytest.approx(reference.sparsemax(z))


def test_entmax15_solves_its_equation():
    z = np.array([1.0, 0.4, -0.3, -2.0])
    p = reference.entmax(z)
    support = p > 0
    # √p = z/2 − τ on the support, and off it z/2 ≤ τ
    tau = z[support] / 2 - np.sqrt(p[support])
    assert np.ptp(tau) == pytest.approx(0, abs=1e-12)
    assert (z[~support] / 2 <= tau[0]).all()
    assert p.sum() == pytest.approx(1)


def test_a_function_may_normalise():
    output = reference.attention(Q, K, V, normalizer=lambda z: np.full_like(z, 1 / len(z)))
    np.testing.assert_allclose(output, np.repeat(V.mean(2, keepdims=True), 2, 1).repeat(3, 2))


def test_nothing_but_numpy_goes_in_or_out():
    for path in Path(reference.__file__).parent.glob("*.py"):
        assert "torch" not in path.read_text(), path
    assert isinstance(reference.attention(Q, K, V), np.ndarray)


BAD = {
    "query: expected four axes, none of them empty, got shape (4, 3, 5)": {"query": Q[0]},
    "value: expected four axes, none of them empty, got shape (2, 2, 0, 7)": {"value": V[:, :, :0]},
    "key, value: expected shapes that fit query …, got (2, 2, 6, 4) and (2, 2, 6, 7)": {"key": K[..., :4]},
    "key, value: expected shapes that fit query …, got (2, 2, 6, 5) and (2, 2, 5, 7)": {"value": V[:, :, :5]},
    "key, value: expected shapes that fit query …, got (2, 2, 6, 5) and (2, 2, 6, 7)": {"query": Q[:, :3]},
    "attn_mask: expected a bool array (True = may attend), got float64 array": {"attn_mask": np.ones((3, 6))},
    "attn_mask: expected broadcastable to (B, H, L, S) = (2, 4, 3, 6), got shape (3, 5)": {
        "attn_mask": np.ones((3, 5), bool)
    },
    "bias: expected broadcastable to (B, H, L, S) = (2, 4, 3, 6), got shape (6, 3)": {"bias": np.ones((6, 3))},
    "query, key, bias: expected no NaN among the scores, got 144 of 144": {"query": Q * np.nan},
    "normalizer: expected one of 'softmax', …, 'sigmoid', got 'hardmax'": {"normalizer": "hardmax"},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        reference.attention(**{"query": Q, "key": K, "value": V, **arguments})


def test_a_gradient_of_another_shape_is_named():
    with complains("grad_output: expected (B, H, L, Dv) = (2, 4, 3, 7), got shape (2, 4, 3, 5)"):
        reference.attention_gradients(Q, K, V, np.zeros((2, 4, 3, 5)))
