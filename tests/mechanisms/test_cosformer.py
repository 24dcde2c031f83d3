"""cosFormer: the split cosine is the cosine."""

from __future__ import annotations

import pytest
import torch

from attnbook.measure import peak_memory
from attnbook.mechanisms import cosformer_attention
from helpers import assert_close, complains, name_of


def inputs(L: int, S: int):
    return tuple(torch.randn(2, 2, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((L, 5), (S, 5), (S, 3)))


def directly(q, k, v, horizon: int, is_causal: bool):
    """The quadratic form, as the paper writes it, with the ends aligned."""
    L, S = q.shape[2], k.shape[2]
    distance = torch.arange(L)[:, None] + (S - L) - torch.arange(S)
    weights = q.relu() @ k.relu().mT * torch.cos(torch.pi / 2 * distance.double() / horizon)
    if is_causal:
        weights = weights * (distance >= 0)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total == 0, 1.0, total)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(20, 20), (9, 20), (20, 9)], ids=name_of)
@pytest.mark.parametrize("horizon", [None, 33])
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_the_decomposition_equals_the_direct_form(is_causal, lengths, horizon, form):
    q, k, v = inputs(*lengths)
    grad = torch.randn(2, 2, lengths[0], 3, dtype=torch.float64)
    expected = directly(q, k, v, horizon or max(lengths), is_causal)
    output = cosformer_attention(q, k, v, horizon=horizon, is_causal=is_causal, form=form, chunk_size=6)
    assert_close(output, expected)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    for found, right in zip(torch.autograd.grad(output, (q, k, v), grad), wanted, strict=True):
        assert_close(found, right, gradient=True, times=4)


def test_weights_are_never_negative_and_fall_with_the_distance():
    ones = torch.ones(1, 1, 30, 1, dtype=torch.float64)
    weights = cosformer_attention(ones, ones, torch.eye(30, dtype=torch.float64)[None, None])[0, 0]
    assert (weights > 0).all()
    assert (weights[29].diff() > 0).all()


def test_a_fixed_horizon_makes_prefixes_agree():
    q, k, v = inputs(20, 20)
    prefix = [x[:, :, :8] for x in (q, k, v)]
    whole = cosformer_attention(q, k, v, is_causal=True, horizon=64)[:, :, :8]
    assert_close(cosformer_attention(*prefix, is_causal=True, horizon=64), whole)
    assert not torch.allclose(cosformer_attention(*prefix, is_causal=True), whole)


def test_memory_grows_linearly():
    def peak(n):
        x = torch.ones(1, 1, n, 8)
        return peak_memory(lambda: cosformer_attention(x, x, x, is_causal=True, chunk_size=32))

    assert peak(2048) < 4.5 * peak(512)


GOOD = torch.zeros(2, 4, 3, 8)


def test_bad_arguments_are_named():
    with complains("horizon: expected an integer ≥ 3, the longer of queries and keys, got 2"):
        cosformer_attention(GOOD, GOOD, GOOD, horizon=2)
    with complains("horizon: expected an integer ≥ 1, got 0"):
        cosformer_attention(GOOD, GOOD, GOOD, horizon=0)
    with complains("chunk_size: expected an integer ≥ 1, got 0"):
        cosformer_attention(GOOD, GOOD, GOOD, chunk_size=0)
