"""Measurement: ratios, memory, arithmetic."""

from __future__ import annotations

import time

import pytest
import torch

import attnbook
from attnbook import measure
from attnbook.measure import Ratio
from helpers import complains


class Clock:
    """A clock that functions move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        def work():
            calls.append(seconds)
            self.now += seconds

        return work


calls: list[float] = []


def test_functions_are_timed_in_turns_and_short_ones_called_once_more_before():
    clock = Clock()
    calls.clear()
    times = measure.interleaved({"a": clock.spend(1.0), "b": clock.spend(3.0)}, rounds=3, clock=clock)
    assert times == {"a": [1, 1, 1], "b": [3, 3, 3]}
    assert calls == [1, 3, *(1, 1, 3, 3), *(3, 3, 1, 1), *(1, 1, 3, 3)]


def test_long_functions_are_not_called_once_more(monkeypatch):
    monkeypatch.setattr(measure, "SHORT", 0.0)
    clock = Clock()
    calls.clear()
    measure.interleaved({"a": clock.spend(1.0), "b": clock.spend(3.0)}, rounds=2, clock=clock)
    assert calls == [1, 3, *(1, 3), *(3, 1)]


def test_a_function_that_is_slow_only_at_first_is_called_once_more_from_its_second_turn_on(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def loads():
        calls.append(1)
        now[0] += 2 * measure.SHORT if len(calls) == 1 else 0

    measure.interleaved({"a": loads}, rounds=3)
    assert len(calls) == 1 + 1 + 2 + 2


def test_ratio_is_of_rounds_not_of_medians():
    times = {"a": [1.0, 4.0, 30.0, 8.0, 5.0], "b": [1.0, 2.0, 10.0, 2.0, 1.0]}
    assert measure.ratio(times, "a", "b") == Ratio(3.0, 2.0, 4.0)
    assert measure.ratio(times, "b", "a").median == pytest.approx(1 / 3)
    assert measure.ratio({"a": [6.0], "b": [2.0]}, "a", to="b") == Ratio(3, 3, 3)


def test_peak_memory_of_known_allocations():
    def hold(*sizes):
        kept = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        del kept

    def one_after_another():
        for _ in range(3):
            block = torch.empty(1 << 20, dtype=torch.uint8)
            del block

    assert measure.peak_memory(lambda: hold(1 << 20, 1 << 21)) == pytest.approx(3 << 20, rel=0.01)
    assert measure.peak_memory(one_after_another) == pytest.approx(1 << 20, rel=0.01)
    assert measure.peak_memory(lambda: None) == 0


def test_peak_memory_is_the_same_on_every_run():
    q = torch.randn(1, 2, 64, 8)
    run = lambda: attnbook.attention(q, q, q, backend="reference")  # noqa: E731
    first = measure.peak_memory(run)
    assert measure.peak_memory(run) == first
    assert first >= 2 * 64 * 64 * 4  # the matrix of weights at least


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize(("L", "S", "D", "Dv"), [(16, 16, 8, 8), (5, 9, 4, 7)])
def test_the_formula_equals_the_counter(backward, heads, kv_heads, L, S, D, Dv):
    q, k, v = (
        torch.randn(3, h, n, d, requires_grad=True) for h, n, d in ((heads, L, D), (kv_heads, S, D), (kv_heads, S, Dv))
    )

    def run():
        output = attnbook.attention(q, k, v, backend="reference")
        if backward:
            output.sum().backward()

    formula = measure.attention_flops(L, S, D, Dv=Dv, heads=heads, batch_size=3, backward=backward)
    assert measure.count_flops(run) == formula


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_backends_that_recompute_need_a_sixth_more(backend):
    q, k, v = (torch.randn(2, 3, 32, 8, requires_grad=True) for _ in range(3))
    forward = measure.attention_flops(32, 32, 8, heads=3, batch_size=2)
    assert measure.count_flops(lambda: attnbook.attention(q, k, v, backend=backend)) == forward
    both = measure.count_flops(lambda: attnbook.attention(q, k, v, backend=backend).sum().backward())
    assert both == forward * 7 / 2  # the backward pass has five products in place of four


def test_products_in_place_are_counted():
    x = torch.zeros(4, 4)
    assert measure.count_flops(lambda: x.addmm_(x, x)) == 2 * 4**3


def test_the_formula_by_hand():
    assert measure.attention_flops(2, 3, 4) == 2 * 2 * 3 * 8
    assert measure.attention_flops(2, 3, 4, Dv=6, heads=5, batch_size=7) == 2 * 2 * 3 * 10 * 35
    assert measure.attention_flops(2, 3, 4, backward=True) == 3 * measure.attention_flops(2, 3, 4)


@pytest.mark.parametrize(("L", "S"), [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_causal_counts_the_allowed_pairs(L, S):
    pairs = int(attnbook.masks.causal(L, S).sum())
    assert measure.attention_flops(L, S, 4, is_causal=True) == 2 * pairs * 8


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: measure.interleaved({}), "functions: expected at least one, got none"),
        (lambda: measure.interleaved({"a": int}, rounds=0), "rounds: expected an integer ≥ 1, got 0"),
        (lambda: measure.ratio({"a": [1.0]}, "b", "a"), "name: expected one of 'a', got 'b'"),
        (lambda: measure.ratio({"a": [1.0]}, "a", "c"), "to: expected one of 'a', got 'c'"),
        (lambda: measure.attention_flops(0, 1, 1), "L: expected an integer ≥ 1, got 0"),
        (lambda: measure.attention_flops(1, 0, 1), "S: expected an integer ≥ 1, got 0"),
        (lambda: measure.attention_flops(1, 1, 0), "D: expected an integer ≥ 1, got 0"),
        (lambda: measure.attention_flops(1, 1, 1, Dv=0), "Dv: expected an integer ≥ 1, got 0"),
        (lambda: measure.attention_flops(1, 1, 1, heads=0), "heads: expected an integer ≥ 1, got 0"),
        (lambda: measure.attention_flops(1, 1, 1, batch_size=0), "batch_size: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()


def test_sparse_products_count_their_entries():
    dense, right = torch.eye(6), torch.randn(6, 5)
    assert measure.count_flops(lambda: dense @ right) == 2 * 6 * 6 * 5
    sparse = dense.to_sparse_coo()
    assert measure.count_flops(lambda: sparse @ right) == 2 * 6 * 5


def test_bytes_of_known_operations():
    a, b = torch.randn(8, 4), torch.randn(4)
    assert measure.count_bytes(lambda: a + a) == 2 * a.nbytes
    assert measure.count_bytes(lambda: a + b) == 2 * a.nbytes + b.nbytes
    assert measure.count_bytes(lambda: a.T[1:]) == 0
    assert measure.count_bytes(lambda: a.add_(1.0)) == 2 * a.nbytes
    assert measure.count_bytes(lambda: torch.empty(5)) == 0
    assert measure.count_bytes(lambda: torch.zeros(5)) == 20
    assert measure.count_bytes(lambda: b.expand(8, 4).clone()) == b.nbytes + a.nbytes
    assert measure.count_bytes(lambda: torch.cat([a, a[:2]])) == a.nbytes + a[:2].nbytes + a.nbytes * 10 // 8


def test_bytes_kept_for_the_backward_pass():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert measure.saved_bytes(lambda: (x @ w).exp()) == x.nbytes + w.nbytes + 8 * 3 * 4
    assert measure.saved_bytes(lambda: (x @ w).exp(), besides=[w]) == x.nbytes + 8 * 3 * 4
    assert measure.saved_bytes(lambda: x.exp() * x.exp().detach()) == 2 * x.nbytes
    assert measure.saved_bytes(lambda: x + x) == 0


def test_memory_of_another_device_is_refused():
    with complains("device: expected one of 'cpu', 'cuda', got 'tpu'"):
        measure.peak_memory(lambda: None, device="tpu")
