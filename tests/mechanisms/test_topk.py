"""Top-k attention: the largest scores, an error bounded by the weight dropped, and no matrix."""

from __future__ import annotations

import pytest
import torch

from attnbook import reference
from attnbook.mechanisms import tiled_attention, topk_attention
from helpers import array, assert_close, complains


def inputs(L: int, S: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 2, spread: float = 1.0):
    sizes = ((heads, L, 5), (kv_heads, S, 5), (kv_heads, S, 3))
    q, k, v = (torch.randn(batch, h, n, d, dtype=torch.float64) for h, n, d in sizes)
    return (spread * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("k", [20, 50])
def test_as_many_as_there_are_is_exact(is_causal, k):
    q, key, v = inputs(20, 20)
    found = topk_attention(q, key, v, k=k, is_causal=is_causal, block_size=7)
    expected = tiled_attention(q, key, v, is_causal=is_causal)
    assert_close(found, expected)
    grad = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, key, v), grad), torch.autograd.grad(expected, (q, key, v), grad), strict=True
    ):
        assert_close(ours, theirs, gradient=True)


def test_one_key_gives_its_value():
    q, key, v = inputs(6, 9, kv_heads=4)
    best = (q @ key.transpose(-1, -2)).argmax(-1)
    assert_close(topk_attention(q, key, v, k=1), v.gather(2, best[..., None].expand(-1, -1, -1, 3)))


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("k", [1, 4, 16, 39])
def test_the_error_is_at_most_twice_the_weight_dropped_times_the_longest_value(k, spread):
    q, key, v = inputs(30, 40, kv_heads=4, spread=spread)
    expected, weights = reference.attention(array(q), array(key), array(v), return_weights=True)
    dropped = 1 - torch.from_numpy(weights).topk(k).values.sum(-1)
    error = (topk_attention(q, key, v, k=k) - torch.from_numpy(expected)).norm(dim=-1)
    bound = 2 * dropped * v.norm(dim=-1).amax(-1, keepdim=True)
    assert (error <= bound + 1e-14).all()
    assert error.max() > 0.02 * bound.max()  # the bound is not idle


def test_the_bound_is_reached():
    # Two keys of equal weight and opposite values: half the weight is dropped, and the error is 1 = 2 · ½ · 1.
    q = torch.ones(1, 1, 1, 1)
    key, v = torch.tensor([1.0, 1.0 - 1e-6]).view(1, 1, 2, 1), torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    assert float(topk_attention(q, key, v, k=1)) == pytest.approx(1, abs=1e-5)
    assert float(tiled_attention(q, key, v)) == pytest.approx(0, abs=1e-5)


def test_equal_scores_are_all_kept():
    q, key, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 5, 2), torch.arange(5.0).view(1, 1, 5, 1)
    key[:, :, 4] = -1
    assert float(topk_attention(q, key, v, k=2)) == pytest.approx((0 + 1 + 2 + 3) / 4)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_every_block_size_gives_the_same(block_size):
    q, key, v = inputs(23, 31)
    mask = torch.rand(2, 1, 23, 31) < 0.5
    expected = reference.topk_attention(array(q), array(key), array(v), k=4, attn_mask=array(mask), is_causal=True)
    assert_close(topk_attention(q, key, v, k=4, attn_mask=mask, is_causal=True, block_size=block_size), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    q, key, v = inputs(5, 4, heads=2, kv_heads=1, batch=1)
    mask = torch.rand(5, 4) < 0.8
    mask[3] = False

    def call(q, key, v):
        return topk_attention(q, key, v, k=2, attn_mask=mask, is_causal=is_causal, block_size=2)

    assert torch.autograd.gradcheck(call, (q, key, v))


def test_memory_grows_linearly():
    from attnbook.measure import peak_memory

    def peak(n: int) -> int:
        q = torch.randn(1, 1, n, 8, requires_grad=True)
        return peak_memory(lambda: topk_attention(q, q, q, k=9, block_size=32).sum().backward())

    small, large = peak(512), peak(2048)
    assert large < 6 * small  # 4 for linear, 16 for quadratic growth
    assert large < 2048 * 2048 * 4 / 4


def test_bad_arguments_are_named():
    x = torch.zeros(1, 1, 3, 2)
    with complains("k: expected an integer ≥ 1, got 0"):
        topk_attention(x, x, x, k=0)
    with complains("block_size: expected an integer ≥ 1, got 0"):
        topk_attention(x, x, x, k=1, block_size=0)
    with complains("query: expected no NaN, got 6 NaN of 6 elements"):
        topk_attention(x * float("nan"), x, x, k=1)
