"""Perceiver and induced set attention: a long input through a few learned queries."""

from __future__ import annotations

import pytest
import torch

import attnbook
from attnbook import measure
from attnbook.mechanisms import induced_set_attention, perceiver_attention
from helpers import array, assert_close, complains


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batched", [False, True], ids=["learned", "second read"])
def test_perceiver_reads_as_attention_does(kv_heads, batched):
    latents = draw(*((2,) if batched else ()), 4, 3, 5)
    key, value = draw(2, kv_heads, 301, 5), draw(2, kv_heads, 301, 6)
    mask = torch.rand(2, 1, 1, 301) < 0.7
    mask[1] = False
    found = perceiver_attention(latents, key, value, attn_mask=mask)
    assert_close(found, attnbook.attention(latents.expand(2, 4, 3, 5), key, value, attn_mask=mask))
    assert_close(
        found, attnbook.reference.perceiver_attention(*map(array, (latents, key, value)), attn_mask=array(mask))
    )
    assert not found[1].any()


def test_a_set_in_another_order_gives_the_outputs_in_that_order():
    q, k, v, points = draw(2, 4, 20, 5), draw(2, 2, 20, 5), draw(2, 2, 20, 6), draw(4, 3, 5)
    order = torch.randperm(20)
    found = induced_set_attention(*(x[:, :, order] for x in (q, k, v)), inducing=points)
    assert_close(found, induced_set_attention(q, k, v, inducing=points)[:, :, order], times=4)
    # ... and the order of the inducing points does not matter.
    assert_close(found, induced_set_attention(*(x[:, :, order] for x in (q, k, v)), inducing=points.flip(1)), times=4)


def test_inducing_points_that_single_out_one_key_each_give_attention():
    # Orthogonal keys and inducing points far along them: point m pools key m alone, and nothing is lost.
    q, v = draw(2, 1, 9, 6), draw(2, 1, 6, 4)
    k = torch.eye(6, dtype=torch.float64).expand(2, 1, 6, 6)
    found = induced_set_attention(q, k, v, inducing=1e4 * k[0])
    assert_close(found, attnbook.attention(q, k, v))


def test_the_second_attention_may_project_the_pooled_set_instead():
    # The paper projects what was pooled, H W; we pool what was projected, X W: the same, as pooling is linear.
    x, points = draw(1, 1, 12, 5), draw(1, 3, 5)
    w_k, w_v = draw(5, 5), draw(5, 4)
    k = x @ w_k
    pooled = attnbook.attention(points[None], k, x)  # (1, 1, 3, 5): the paper's H
    expected = attnbook.attention(x, pooled @ w_k, pooled @ w_v)
    assert_close(induced_set_attention(x, k, x @ w_v, inducing=points), expected, times=20)


def test_work_and_memory_grow_linearly():
    def call(n: int):
        q = torch.zeros(1, 1, n, 8)
        points = torch.zeros(1, 4, 8)
        return lambda: induced_set_attention(q, q, q, inducing=points)

    assert measure.count_flops(call(4096)) == 4 * measure.count_flops(call(1024))
    small, large = measure.peak_memory(call(1024)), measure.peak_memory(call(4096))
    assert large < 5 * small  # 4 for linear, 16 for quadratic growth


def test_reading_costs_in_proportion_to_the_input():
    latents = torch.zeros(1, 4, 8)

    def call(n: int):
        x = torch.zeros(1, 1, n, 8)
        return lambda: perceiver_attention(latents, x, x)

    assert measure.count_flops(call(4096)) == 4 * measure.count_flops(call(1024)) == 4 * 4 * 1024 * 4 * 8


def test_gradcheck():
    q, k, v, points = (draw(*s).requires_grad_() for s in ((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (2, 3, 3)))
    mask = torch.tensor([True, True, False, True, True])[None, None, None]
    call = lambda q, k, v, i: induced_set_attention(q, k, v, inducing=i, attn_mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, points))
    assert torch.autograd.gradcheck(perceiver_attention, (points, k, v))


X, POINTS = torch.zeros(2, 4, 5, 8), torch.zeros(4, 3, 8)
BAD = {
    "inducing: expected a tensor (H, M, D), got float32 tensor of shape (3, 8)": {"inducing": POINTS[0]},
    "inducing: expected last axis D = 8, that of key, got shape (4, 3, 7)": {"inducing": POINTS[..., :7]},
    "inducing: expected (H, M, D) with H = 4, got shape (2, 3, 8)": {"inducing": POINTS[:2]},
    "attn_mask: expected a mask of keys, (…, 1, S), the same for all queries: this mechanism never looks at single "
    "pairs, got bool tensor of shape (5, 5)": {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
    "is_causal: expected False: this mechanism has no causal form (these have: attention, linear_attention, "
    "sliding_window_attention), got True": {"is_causal": True},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    arguments = {"query": X, "key": X, "value": X, "inducing": POINTS, **arguments}
    with complains(text):
        induced_set_attention(**arguments)


def test_perceiver_names_bad_arguments():
    with complains("latents: expected last axis D = 8, that of key, got shape (4, 3, 7)"):
        perceiver_attention(POINTS[..., :7], X, X)
