"""Attention with stored weights: whatever the height of a panel, the result of the whole."""

from __future__ import annotations

import pytest
import torch

import attnbook
from attnbook.measure import peak_memory
from attnbook.mechanisms import stored, stored_attention
from helpers import array, assert_close, complains, name_of


def inputs(L: int, S: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64, batch: int = 2):
    return tuple(
        torch.randn(batch, h, n, d).to(dtype).requires_grad_()
        for h, n, d in ((heads, L, 5), (kv_heads, S, 5), (kv_heads, S, 3))
    )


@pytest.mark.parametrize("fast", [False, True], ids=["widened", "half"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("block_size", [7, 1000])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(33, 33), (20, 50), (50, 20)], ids=name_of)
def test_every_panel_gives_the_reference(monkeypatch, lengths, is_causal, block_size, dtype, fast):
    monkeypatch.setattr(stored, "multiplies_fast", lambda dtype: fast)
    q, k, v = inputs(*lengths, dtype=dtype)
    mask = torch.rand(2, 1, *lengths) < 0.5
    mask[1, :, ::4] = False
    grad = torch.randn(2, 4, lengths[0], 3).to(dtype)
    options = {"attn_mask": mask, "is_causal": is_causal}
    output = stored_attention(q, k, v, block_size=block_size, **options)
    arrays = [array(x) for x in (q, k, v)]
    assert_close(output, attnbook.reference.attention(*arrays, **options))
    expected = attnbook.reference.attention_gradients(*arrays, array(grad), **options)
    for found, wanted in zip(torch.autograd.grad(output, (q, k, v), grad), expected, strict=True):
        assert_close(found, wanted, gradient=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    q, k, v = inputs(4, 6, heads=2, kv_heads=1, batch=1)
    bias = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias):
        return stored_attention(q, k, v, bias=bias, is_causal=is_causal, block_size=3)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


def test_weights_are_kept_for_a_gradient_alone_and_causal_ones_by_half():
    q = torch.zeros(1, 1, 512, 8)
    matrix = 512 * 512 * 4

    def peak(**options) -> int:
        leaf = q.clone().requires_grad_()
        return peak_memory(lambda: stored_attention(leaf, leaf, leaf, block_size=32, **options))

    assert matrix < peak() < 1.5 * matrix
    assert peak(is_causal=True) < 0.75 * matrix
    with torch.no_grad():
        assert peak() < 0.3 * matrix


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = inputs(3, 3)
    (gradient,) = torch.autograd.grad(stored_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


GOOD = torch.zeros(2, 4, 3, 8)
BAD = {
    "query: expected a tensor (B, H, L, D), got float32 tensor of shape (4, 3, 8)": {"query": GOOD[0]},
    "key: expected no NaN, got 192 NaN of 192 elements": {"key": GOOD * float("nan")},
    "bias: expected no NaN, got 9 NaN of 9 elements": {"bias": torch.full((3, 3), float("nan"))},
    "attn_mask: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 3)": {
        "attn_mask": torch.ones(3, 3)
    },
    "block_size: expected an integer ≥ 1, got 0": {"block_size": 0},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        stored_attention(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})
