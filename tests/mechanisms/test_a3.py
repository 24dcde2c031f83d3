"""A³: the search finds what sorting would, better as it looks longer, and makes no more products than it says."""

from __future__ import annotations

import pytest
import torch

from attnbook import reference
from attnbook.mechanisms import a3_attention, tiled_attention
from attnbook.mechanisms.a3 import a3_selection, sort_keys
from helpers import array, assert_close, complains


def inputs(L: int, S: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 2, spread: float = 1.0, D: int = 8):
    sizes = ((heads, L, D), (kv_heads, S, D), (kv_heads, S, 3))
    q, k, v = (torch.randn(batch, h, n, d, dtype=torch.float64) for h, n, d in sizes)
    return (spread * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()


def test_looking_at_everything_gives_softmax_over_the_positive_scores():
    q, k, v = inputs(13, 17)
    found = a3_attention(q, k, v, iterations=17 * 8)
    positive = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) > 0
    assert positive.any(-1).all()
    assert_close(found, tiled_attention(q, k, v, attn_mask=positive))


@pytest.mark.parametrize("iterations", [1, 3, 10, 40])
def test_the_search_finds_the_extreme_products(iterations):
    q, k, _ = inputs(9, 15, kv_heads=4)
    found = a3_selection(q, k, iterations=iterations)
    products = q[:, :, :, None] * k[:, :, None]  # (B, H, L, S, D)
    flat = products.detach().flatten(3)
    greedy = torch.zeros_like(flat)
    for sign in (1, -1):
        top = (sign * flat).topk(iterations)
        greedy.scatter_add_(-1, top.indices, sign * top.values.clamp(min=0))
    expected = greedy.view(products.shape).sum(-1) > 0
    some = expected.any(-1)  # the other queries took the best of what was left
    assert some.double().mean() > 0.9
    assert torch.equal(found.candidates[some], expected[some])
    assert (found.candidates[~some].sum(-1) == 1).all()


def test_the_work_is_what_was_promised():
    q, k, _ = inputs(20, 64)
    for iterations in (1, 8, 32):
        found = a3_selection(q, k, iterations=iterations, threshold=0.1)
        assert (found.products <= 2 * (8 + iterations)).all()
        assert (found.products >= 2 * 8).all()
        assert (found.candidates.sum(-1) <= max(1, iterations)).all()
        assert (found.candidates.sum(-1) >= 1).all()
        assert (found.kept <= found.candidates).all()
        expected = found.products + 8 * found.candidates.sum(-1) + 3 * found.kept.sum(-1)
        assert torch.equal(found.multiplications(8, 3), expected)
    few = a3_selection(q, k, iterations=4).multiplications(8, 3).double().mean()
    assert few < 0.2 * 64 * (8 + 3)


def recall(q: torch.Tensor, k: torch.Tensor, iterations: int, top: int) -> float:
    found = a3_selection(q, k, iterations=iterations).candidates
    best = (q @ k.transpose(-1, -2)).topk(top).indices
    return float(found.gather(-1, best).double().mean())


def test_longer_search_finds_more_of_the_true_top_keys():
    q, k, _ = inputs(60, 100, kv_heads=4, spread=2.0, D=16)
    found = [recall(q, k, iterations, 5) for iterations in (5, 25, 100, 400)]
    assert found == sorted(found)
    assert found[0] < 0.5
    assert found[2] > 0.9
    assert found[3] > 0.99


def test_the_error_falls_as_the_search_grows_and_stays_below_the_bound():
    q, k, v = inputs(40, 80, kv_heads=4, spread=2.0)
    exact, weights = reference.attention(array(q), array(k), array(v), return_weights=True)
    errors = []
    for iterations in (4, 20, 100, 640):
        error = (a3_attention(q, k, v, iterations=iterations) - torch.from_numpy(exact)).norm(dim=-1)
        kept = a3_selection(q, k, iterations=iterations).kept
        dropped = 1 - (torch.from_numpy(weights) * kept).sum(-1)
        assert (error <= 2 * dropped * v.norm(dim=-1).amax(-1, keepdim=True) + 1e-13).all()
        errors.append(float(error.detach().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_the_threshold_keeps_keys_of_enough_weight():
    q, k, _ = inputs(10, 30, kv_heads=4, spread=2.0)
    every, some = (a3_selection(q, k, iterations=60, threshold=t) for t in (0.0, 0.2))
    assert torch.equal(every.kept, every.candidates)
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    share = (scores - scores.masked_fill(~every.candidates, -torch.inf).amax(-1, keepdim=True)).exp()
    assert torch.equal(some.kept, every.candidates & (share >= 0.2))
    assert some.kept.sum() < 0.7 * every.kept.sum()


def test_prepared_keys_serve_many_calls():
    q, k, v = inputs(11, 25)
    mask = torch.rand(2, 1, 1, 25) < 0.6
    prepared = sort_keys(k, attn_mask=mask)
    assert not prepared.values.requires_grad
    assert (prepared.values.diff(dim=-1)[prepared.values.diff(dim=-1).isfinite()] >= 0).all()
    whole = a3_attention(q, k, v, iterations=12, attn_mask=mask)
    for rows in (slice(0, 1), slice(1, 11)):
        part = a3_attention(q[:, :, rows], k, v, iterations=12, prepared=prepared)
        assert_close(part, whole[:, :, rows])


def test_hidden_keys_act_as_if_absent():
    q, k, v = inputs(7, 20)
    mask = torch.arange(20).view(1, 1, 1, 20) >= 6
    found = a3_attention(q, k, v, iterations=9, attn_mask=mask)
    assert_close(found, a3_attention(q, k[:, :, 6:], v[:, :, 6:], iterations=9))


def test_query_heads_of_a_group_may_see_different_keys():
    q, k, v = inputs(7, 20)
    mask = torch.rand(2, 4, 1, 20) < 0.5
    expected = reference.a3_attention(array(q), array(k), array(v), iterations=9, attn_mask=array(mask))
    assert_close(a3_attention(q, k, v, iterations=9, attn_mask=mask), expected)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_equal_products_are_taken_in_the_order_specified(scale):
    q, k, v = (torch.randint(-2, 3, (2, 2, 12, 3)).double() for _ in range(3))  # ties everywhere, and zeros
    for iterations in (1, 2, 5, 11):
        options = {"iterations": iterations, "threshold": 0.3, "scale": scale}
        assert_close(a3_attention(q, k, v, **options), reference.a3_attention(*map(array, (q, k, v)), **options))


def test_a_query_of_zeros_takes_the_first_key_it_may_see():
    q, k, v = inputs(1, 5, heads=1, kv_heads=1, batch=1)
    mask = torch.tensor([False, False, True, True, True])
    found = a3_attention(torch.zeros_like(q), k, v, iterations=3, attn_mask=mask.view(1, 1, 1, 5))
    assert torch.equal(found[0, 0, 0], v[0, 0, 2])


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_every_block_size_gives_the_same(block_size):
    q, k, v = inputs(13, 21)
    expected = reference.a3_attention(array(q), array(k), array(v), iterations=10, threshold=0.05)
    assert_close(a3_attention(q, k, v, iterations=10, threshold=0.05, block_size=block_size), expected)


def test_gradcheck():
    q, k, v = inputs(3, 6, heads=2, kv_heads=1, batch=1)
    assert torch.autograd.gradcheck(lambda *x: a3_attention(*x, iterations=5, threshold=0.1), (q, k, v))


X = torch.zeros(1, 2, 4, 3)
BAD = {
    "iterations: expected an integer ≥ 1, got 0": {"iterations": 0},
    "threshold: expected a number in [0, 1), got 1.0": {"threshold": 1.0},
    "block_size: expected an integer ≥ 1, got 0": {"block_size": 0},
    "is_causal: expected False: this mechanism has no causal form (these have: topk_attention, lsh_attention, "
    "routing_attention), got True": {"is_causal": True},
    "prepared: expected sorted keys (B, Hkv, D, S) = (1, 2, 3, 4), got float32 tensor of shape (1, 2, 3, 5)": {
        "prepared": sort_keys(torch.zeros(1, 2, 5, 3))
    },
    "attn_mask: expected none: sort_keys takes it where keys are prepared, got bool tensor of shape (1, 1, 1, 4)": {
        "prepared": sort_keys(X),
        "attn_mask": torch.ones(1, 4, dtype=torch.bool),
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        a3_attention(**{"query": X, "key": X, "value": X, "iterations": 2, **arguments})


def test_keys_to_sort_are_checked():
    with complains("key: expected no NaN, got 24 NaN of 24 elements"):
        sort_keys(X * float("nan"))
    with complains(
        "attn_mask: expected broadcastable to (B, Hkv, 1, S) = (1, 2, 1, 4), got bool tensor of shape (4, 4)"
    ):
        sort_keys(X, attn_mask=torch.ones(4, 4, dtype=torch.bool))
