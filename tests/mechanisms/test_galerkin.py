"""Galerkin and Fourier attention: two orders of one product, and a quadrature."""

from __future__ import annotations

import math

import pytest
import torch

from attnbook.measure import count_flops
from attnbook.mechanisms import fourier_attention, galerkin_attention
from helpers import assert_close, complains

BOTH = pytest.mark.parametrize("function", [galerkin_attention, fourier_attention])


def inputs(L: int = 20, S: int = 20, *, heads: int = 2, width: int = 6):
    return tuple(torch.randn(2, heads, n, width, dtype=torch.float64, requires_grad=True) for n in (L, S, S))


@BOTH
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_forms_agree(function, form, is_causal):
    q, k, v = inputs(20, 17)
    grad = torch.randn(2, 2, 20, 6, dtype=torch.float64)
    expected = function(q, k, v, is_causal=is_causal, chunk_size=6)
    output = function(q, k, v, is_causal=is_causal, form=form)
    assert_close(output, expected)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    for found, right in zip(torch.autograd.grad(output, (q, k, v), grad), wanted, strict=True):
        assert_close(found, right, gradient=True)


def test_the_formulas_with_pytorchs_own_layer_norm():
    q, k, v = inputs()
    first, second = (torch.nn.LayerNorm(6, dtype=torch.float64) for _ in range(2))
    for parameter in (*first.parameters(), *second.parameters()):
        torch.nn.init.normal_(parameter)
    galerkin = galerkin_attention(
        q, k, v, key_scale=first.weight, key_shift=first.bias, value_scale=second.weight, value_shift=second.bias
    )
    assert_close(galerkin, q @ (first(k).mT @ second(v)) / 20)
    fourier = fourier_attention(
        q,
        k,
        v,
        query_scale=first.weight,
        query_shift=first.bias,
        key_scale=second.weight,
        key_shift=second.bias,
        scale=6**-0.5,
    )
    assert_close(fourier, first(q) @ second(k).mT @ v / 20 / math.sqrt(6))


@BOTH
def test_doubling_the_points_changes_nothing(function):
    # What is computed is an integral: the mean over keys does not depend on their number.
    q, k, v = inputs()
    twice = function(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))
    assert_close(twice, function(q, k, v))


def test_the_mean_converges_to_the_integral():
    # Keys and values are smooth and periodic functions of a coordinate: there a mean over equal steps converges faster
    # than any power of their number.
    def at(n):
        x = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
        columns = torch.stack([x.cos(), x.sin(), (2 * x).cos(), (2 * x).sin()], -1)[None, None]
        query = torch.ones(1, 1, 1, 4, dtype=torch.float64)
        return fourier_attention(query.cumsum(-1), columns, columns)

    errors = [float((at(n) - at(512)).abs().max()) for n in (8, 16, 32, 128)]
    assert errors[0] > 4 * errors[1] > 64 * errors[2]
    assert errors[3] < 1e-10


@BOTH
def test_masked_keys_are_absent_from_the_mean(function):
    q, k, v = inputs()
    mask = torch.rand(20) < 0.5
    output = function(q, k, v, attn_mask=mask[None, None, None])
    assert_close(output, function(q, k[:, :, mask], v[:, :, mask]))
    nothing = function(q, k, v, attn_mask=torch.zeros(1, 1, 1, 20, dtype=torch.bool), is_causal=True)
    assert (nothing == 0).all()


@BOTH
def test_work_grows_linearly(function):
    def flops(n, is_causal):
        x = torch.ones(1, 1, n, 8)
        return count_flops(lambda: function(x, x, x, is_causal=is_causal))

    for is_causal in (False, True):
        assert flops(1024, is_causal) == 4 * flops(256, is_causal) > 0


GOOD = torch.zeros(2, 4, 3, 8)


@BOTH
def test_bad_arguments_are_named(function):
    with complains("key_scale: expected (8,) or (4, 8), got shape (7,)"):
        function(GOOD, GOOD, GOOD, key_scale=torch.ones(7))
    with complains("key_shift: expected no NaN, got 8 NaN of 8 elements"):
        function(GOOD, GOOD, GOOD, key_shift=torch.full((8,), math.nan))
    with complains("key_shift: expected a tensor (..., D), got 1.0"):
        function(GOOD, GOOD, GOOD, key_shift=1.0)
    with complains("chunk_size: expected an integer ≥ 1, got 0"):
        function(GOOD, GOOD, GOOD, chunk_size=0)
