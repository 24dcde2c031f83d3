"""Online softmax: whatever the pieces and their order, the result of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbook import normalizers
from attnbook.mechanisms.online_softmax import OnlineSoftmax
from helpers import assert_close, complains

WIDE = torch.float64


def seen(z: torch.Tensor, v: torch.Tensor) -> OnlineSoftmax:
    """The state after one block."""
    state = OnlineSoftmax.empty(z, v.shape[-1])
    state.absorb(z.clone(), v)
    return state


def drawn(keys: int, *, spread: float = 3.0):
    z = spread * torch.randn(2, 5, keys, dtype=WIDE)
    return z, torch.randn(2, keys, 4, dtype=WIDE)


def assert_same(a: OnlineSoftmax, b: OnlineSoftmax) -> None:
    assert torch.equal(a.top, b.top)
    assert_close(a.total, b.total)
    assert_close(a.mix, b.mix)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 1000))
def test_blocks_in_any_order_give_the_softmax(sizes, seed):
    torch.manual_seed(seed)
    z, v = drawn(sum(sizes))
    pieces = list(zip(z.split(sizes, -1), v.split(sizes, 1), strict=True))
    state = OnlineSoftmax.empty(z, 4)
    for i in torch.randperm(len(pieces)).tolist():
        state.absorb(pieces[i][0].clone(), pieces[i][1])
    assert_close(state.output(), normalizers.softmax(z) @ v, times=4)
    assert_close(state.log_sum(), z.logsumexp(-1, keepdim=True), times=4)


@given(st.integers(0, 1000))
def test_merging_is_associative_and_commutative(seed):
    torch.manual_seed(seed)
    a, b, c = (seen(*drawn(n, spread=50.0)) for n in (3, 4, 5))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))


def test_nothing_seen_changes_nothing():
    z, v = drawn(6)
    state, nothing = seen(z, v), OnlineSoftmax.empty(z, 4)
    assert_same(state.merge(nothing), state)
    assert_same(nothing.merge(state), state)
    both = nothing.merge(nothing)
    assert not both.output().any()
    assert (both.log_sum() == -math.inf).all()


def test_absorbing_is_merging_with_one_block():
    z, v = drawn(9)
    state = seen(z[..., :5], v[:, :5])
    expected = state.merge(seen(z[..., 5:], v[:, 5:]))
    state.absorb(z[..., 5:].clone(), v[:, 5:])
    assert_same(state, expected)


def test_a_row_whose_first_blocks_are_masked():
    z, v = drawn(6)
    masked = z.clone()
    masked[:, 2, :4] = -math.inf
    masked[:, 3] = -math.inf
    state = OnlineSoftmax.empty(z, 4)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        state.absorb(masked[..., part].clone(), v[:, part])
    expected = normalizers.softmax(z, mask=masked > -math.inf) @ v
    assert_close(state.output(), expected)
    assert not state.output()[:, 3].any()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_size(shift, dtype):
    z, v = drawn(8)
    z = (z + shift).to(dtype)
    found = seen(z, v.to(dtype)).output()
    assert found.isfinite().all()
    expected = torch.softmax(z.double(), -1) @ v.to(dtype).double()
    assert (found.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps


def test_merging_leaves_both_as_they_were():
    a, b = seen(*drawn(3)), seen(*drawn(3))
    before = [x.clone() for s in (a, b) for x in (s.top, s.total, s.mix)]
    a.merge(b)
    for now, then in zip([x for s in (a, b) for x in (s.top, s.total, s.mix)], before, strict=True):
        assert torch.equal(now, then)


def test_a_state_is_known_by_its_output_and_its_log_sum():
    a, b = seen(*drawn(3)), seen(*drawn(3))
    a.top[0, 0], a.total[0, 0], a.mix[0, 0] = -torch.inf, 0, 0  # a row that saw nothing
    again = OnlineSoftmax.after(a.output(), a.log_sum())
    assert again.output().equal(a.output())
    assert again.log_sum().equal(a.log_sum())
    assert torch.allclose(again.merge(b).output(), a.merge(b).output(), atol=1e-14)
    assert torch.allclose(b.merge(again).log_sum(), a.merge(b).log_sum(), atol=1e-14)


def test_bad_arguments_are_named():
    state = OnlineSoftmax.empty(torch.zeros(2, 5, 1), 4)
    with complains("scores: expected (B, rows, keys) = (2, 5, …), got float32 tensor of shape (2, 6, 3)"):
        state.absorb(torch.zeros(2, 6, 3), torch.zeros(2, 3, 4))
    with complains("values: expected (B, keys, Dv) = (2, 3, 4), got float32 tensor of shape (2, 7, 4)"):
        state.absorb(torch.zeros(2, 5, 3), torch.zeros(2, 7, 4))
    with complains("other: expected a state with mix of shape (2, 5, 4), got float32 tensor of shape (2, 5, 3)"):
        state.merge(OnlineSoftmax.empty(torch.zeros(2, 5, 1), 3))
