"""Attention by a matrix-valued state: three forms, one result; decays however strong; corrections that retrieve."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import attnbook
from attnbook.measure import count_flops, peak_memory
from attnbook.mechanisms import (
    delta_rule_attention,
    gated_linear_attention,
    retention_attention,
    ssd_attention,
)
from attnbook.mechanisms.matrix_state import FORMS, _channel_scores, segment_decays
from attnbook.mechanisms.ssd import retention_gammas
from helpers import DTYPES, array, assert_close, complains, name_of

KINDS = ("delta rule", "gated delta rule", "gated linear", "ssd", "retention")
CHUNKS = (1, 7, 16, 64, 1000)
B, H, HKV, D, DV = 2, 4, 2, 5, 3


def function_of(kind: str):
    return {
        "delta rule": delta_rule_attention,
        "gated delta rule": delta_rule_attention,
        "gated linear": gated_linear_attention,
        "ssd": ssd_attention,
        "retention": retention_attention,
    }[kind]


def draw(kind: str, L: int, dtype: torch.dtype = torch.float64, **sizes: int) -> dict[str, Tensor]:
    """Draw the floating arguments of a call; all of them want gradients."""
    b, h, hkv, d, dv = {"B": B, "H": H, "Hkv": HKV, "D": D, "Dv": DV, **sizes}.values()
    found = {
        "query": torch.randn(b, h, L, d, dtype=torch.float64),
        "key": normalize(torch.randn(b, hkv, L, d, dtype=torch.float64), dim=-1),
        "value": torch.randn(b, hkv, L, dv, dtype=torch.float64),
    }
    if "delta" in kind:
        found["beta"] = 2 * torch.rand(b, h, L, dtype=torch.float64)
    if kind in ("gated delta rule", "ssd"):
        found["log_decay"] = torch.rand(b, h, L, dtype=torch.float64).log()
    if kind == "gated linear":
        found["log_decay"] = torch.rand(b, h, L, d, dtype=torch.float64).log()
    if kind == "retention":
        found["gamma"] = 0.5 + 0.5 * torch.rand(h, dtype=torch.float64)
    return {name: x.to(dtype).requires_grad_() for name, x in found.items()}


def with_gradients(function, given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return output, state, and the gradients of a weighted sum of both."""
    output, state = function(**given, **options, return_state=True)
    draws = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=draws, dtype=torch.float64).to(x)).sum() for x in (output, state))
    return [output, state, *torch.autograd.grad(loss, list(given.values()))]


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_are_equal_forward_and_backward(kind):
    given = {**draw(kind, 70), "state": torch.randn(B, H, D, DV, dtype=torch.float64, requires_grad=True)}
    mask = torch.rand(B, 1, 1, 70) < 0.8
    expected = with_gradients(function_of(kind), given, form="recurrent", attn_mask=mask)
    others = [{"form": "parallel"}, *({"form": "chunked", "chunk_size": size} for size in CHUNKS)]
    for options in others:
        found = with_gradients(function_of(kind), given, attn_mask=mask, **options)
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, o=options: f"{o}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_states_and_masks_are_as_specified(kind, form):
    given = {**draw(kind, 20), "state": torch.randn(B, H, D, DV, dtype=torch.float64)}
    mask = torch.rand(B, H, 1, 20) < 0.7
    found = function_of(kind)(**given, attn_mask=mask, scale=0.3, form=form, chunk_size=8, return_state=True)
    specification = getattr(attnbook.reference, function_of(kind).__name__)
    arrays = {name: array(x) for name, x in given.items()}
    expected = specification(**arrays, attn_mask=mask.numpy(), scale=0.3, return_state=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(13, 20), (32, 1), (1,) * 33], ids=name_of)
def test_a_sequence_in_pieces_gives_the_whole(kind, form, sizes):
    given = draw(kind, 33)
    whole, last = function_of(kind)(**given, form="recurrent", return_state=True)
    pieces, state, start = [], None, 0
    for size in sizes:
        part = {name: x if name == "gamma" else x[:, :, start : start + size] for name, x in given.items()}
        output, state = function_of(kind)(**part, form=form, chunk_size=8, state=state, return_state=True)
        pieces.append(output)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_masked_positions_act_as_absent_whatever_they_hold(kind, form):
    given = draw(kind, 20)
    there = torch.rand(20) < 0.6
    there[0] = False
    kept = {name: x if name == "gamma" else x[:, :, there] for name, x in given.items()}
    held = {name: x.detach().clone() for name, x in given.items()}
    held["value"][:, :, ~there] = math.nan
    options = {"form": form, "chunk_size": 8, "return_state": True}
    found, state = function_of(kind)(**held, attn_mask=there[None, :], **options)
    expected, wanted = function_of(kind)(**kept, **options)
    torch.testing.assert_close(found[:, :, there], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[:, :, 0], torch.zeros_like(found[:, :, 0]))  # nothing to read yet


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_not_changed_and_is_kept_in_float32(kind):
    given = draw(kind, 9, torch.bfloat16)
    state = torch.randn(B, H, D, DV)
    before = state.clone()
    output, after = function_of(kind)(**given, state=state, return_state=True)
    assert torch.equal(state, before)
    assert (output.dtype, after.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(kind, form):
    given = draw(kind, 4, B=1, H=2, Hkv=1, D=3, Dv=2)

    def call(*tensors):
        arguments = dict(zip(given, tensors, strict=True))
        return function_of(kind)(**arguments, form=form, chunk_size=3, return_state=True)

    assert torch.autograd.gradcheck(call, tuple(given.values()))


# Decays.


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_pairs_are_scored_through_the_decays_between_them(size):
    a = torch.rand(2, size, 4, dtype=torch.float64).log()
    x, y = torch.randn(2, 2, size, 4, dtype=torch.float64)
    expected = torch.zeros(2, size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i + 1):
            expected[:, i, j] = (x[:, i] * y[:, j] * a[:, j + 1 : i + 1].exp().prod(1)).sum(-1)
    torch.testing.assert_close(_channel_scores(x, y, a), expected, rtol=1e-13, atol=1e-13)
    one = a[..., :1].expand_as(a)
    torch.testing.assert_close(_channel_scores(x, y, one), (x @ y.mT) * segment_decays(a[..., 0]))


@pytest.mark.parametrize("kind", ["gated delta rule", "gated linear", "ssd"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strong", [-50.0, -1e4, -math.inf])
def test_strong_decays_stay_finite_and_lose_no_digits(kind, form, strong):
    # After strong decays come mild ones: differences of cumulative sums would keep none of their digits.
    given = draw(kind, 30, torch.float32)
    with torch.no_grad():
        given["log_decay"][:, :, :16] = strong
        given["log_decay"][:, :, 16:] *= 0.01
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    found = with_gradients(function_of(kind), given, form=form, chunk_size=24)
    expected = with_gradients(function_of(kind), exact, form="recurrent")
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.isfinite().all()
        assert_close(ours, theirs, gradient=i > 1)


def test_differences_of_cumulative_sums_would_lose_digits():
    a = torch.full((64,), -0.01)
    a[:32] = -50
    c = a.cumsum(0)
    by_differences = (c[:, None] - c).tril().exp().tril()
    exact = segment_decays(a.double())
    assert (by_differences - exact).abs().max() > 1e-5
    assert (segment_decays(a) - exact).abs().max() < 1e-7


@pytest.mark.parametrize("kind", ["gated delta rule", "gated linear", "ssd"])
@pytest.mark.parametrize("form", FORMS)
def test_an_infinite_decay_forgets_all_that_came_before(kind, form):
    given = draw(kind, 20)
    with torch.no_grad():
        given["log_decay"][:, :, 11] = -math.inf
    after = {name: x[:, :, 11:] for name, x in given.items()}
    found = function_of(kind)(**given, form=form, chunk_size=8)[:, :, 11:]
    torch.testing.assert_close(found, function_of(kind)(**after, form=form, chunk_size=8), rtol=1e-12, atol=1e-12)


def test_retention_without_decay_is_linear_attention():
    given = draw("retention", 33)
    q, k, v = given["query"], *(given[name].repeat_interleave(2, 1) for name in ("key", "value"))
    expected = ((q @ k.mT).tril() @ v) / math.sqrt(D)
    given["gamma"] = torch.ones(H, dtype=torch.float64)
    torch.testing.assert_close(retention_attention(**given), expected, rtol=1e-12, atol=1e-12)


def test_retention_is_its_formula_with_the_papers_gammas():
    assert retention_gammas(3).tolist() == [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]
    given = draw("retention", 33, Hkv=H)
    q, k, v, _ = given.values()
    behind = torch.arange(33)[:, None] - torch.arange(33)
    mask = (retention_gammas(H)[:, None, None] ** behind.clamp(min=0)).tril()
    expected = (q @ k.mT / math.sqrt(D) * mask) @ v
    torch.testing.assert_close(retention_attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_each_mechanism_contains_the_simpler_one():
    given = draw("gated delta rule", 33)
    q, k, v, beta, a = given.values()
    gated = partial(delta_rule_attention, q, k, v)
    torch.testing.assert_close(gated(beta, log_decay=torch.zeros(1, dtype=q.dtype)), gated(beta))
    alike = a[..., None].expand(B, H, 33, D)
    torch.testing.assert_close(gated_linear_attention(q, k, v, alike), ssd_attention(q, k, v, a))
    constant = torch.full((H, 1), math.log(0.9), dtype=q.dtype)
    gamma = torch.full((H,), 0.9, dtype=q.dtype)
    torch.testing.assert_close(ssd_attention(q, k, v, constant), retention_attention(q, k, v, gamma=gamma, scale=1.0))


# The delta rule.


@pytest.mark.parametrize("form", FORMS)
def test_the_delta_rule_retrieves_exactly_and_replaces(form):
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[None, None]
    keys = torch.cat([keys, keys], 2)  # each key is written twice
    values = torch.randn(1, 1, 16, 3, dtype=torch.float64)
    ones = torch.ones(1, 1, 16, dtype=torch.float64)
    found, state = delta_rule_attention(keys, keys, values, ones, form=form, chunk_size=6, return_state=True)
    torch.testing.assert_close(found, values, rtol=1e-12, atol=1e-12)  # each is read right after it is written
    torch.testing.assert_close(keys[:, :, 8:] @ state, values[:, :, 8:], rtol=1e-12, atol=1e-12)  # the later one stays
    _, added = ssd_attention(keys, keys, values, 0 * ones, form=form, return_state=True)
    torch.testing.assert_close(keys[:, :, 8:] @ added, values[:, :, :8] + values[:, :, 8:])  # addition mixes them


def test_a_write_of_the_delta_rule_is_a_step_of_gradient_descent():
    q, k, v, beta = draw("delta rule", 1, Hkv=H).values()
    before = torch.randn(B, H, D, DV, dtype=torch.float64, requires_grad=True)
    loss = 0.5 * (k @ before - v).square().sum()
    (gradient,) = torch.autograd.grad(loss, before)
    _, after = delta_rule_attention(q, k, v, beta, state=before, return_state=True)
    torch.testing.assert_close(after, before - beta[..., None] * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "grows"), [(0.5, False), (2.0, False), (2.1, True)])
def test_the_delta_rule_is_stable_up_to_two(size, grows):
    k = normalize(torch.randn(1, 1, 1, D, dtype=torch.float64), dim=-1).expand(1, 1, 50, D)
    state = torch.randn(1, 1, D, DV, dtype=torch.float64)
    nothing, beta = torch.zeros(1, 1, 50, DV, dtype=torch.float64), torch.full((1, 1, 50), size, dtype=torch.float64)
    _, after = delta_rule_attention(k, k, nothing, beta, state=state, return_state=True)
    assert (after.norm() > state.norm() * (1 + 1e-12)).item() == grows


# Cost.


@pytest.mark.parametrize("kind", KINDS)
def test_work_grows_linearly_in_chunks_and_quadratically_in_parallel(kind):
    def flops(form: str, n: int) -> int:
        given = {name: x.detach() for name, x in draw(kind, n, B=1, H=1, Hkv=1, D=4, Dv=4).items()}
        return count_flops(lambda: function_of(kind)(**given, form=form, chunk_size=16))

    assert flops("chunked", 256) == 4 * flops("chunked", 64)
    assert flops("parallel", 256) > 6 * flops("parallel", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_linearly(kind):
    def peak(n: int) -> int:
        given = draw(kind, n, torch.float32, B=1, H=1, Hkv=1, D=8, Dv=8)
        return peak_memory(lambda: function_of(kind)(**given, chunk_size=16).sum().backward())

    small, large = peak(512), peak(2048)
    assert large < 5 * small  # 4 for linear, 16 for quadratic growth


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_summed_in_float32(dtype, form):
    # 1,000 equal terms: summed in bfloat16 they would stop growing at 256.
    q, k = torch.full((1, 1, 1000, 1), 2.0**-10, dtype=dtype), torch.ones(1, 1, 1000, 1, dtype=dtype)
    output = ssd_attention(q, k, k, torch.zeros(1, dtype=dtype), form=form)
    assert output[0, 0, -1].item() == pytest.approx(1000 / 1024, rel=2**-8)


# Independent checks. transformers' layout is (B, L, H, D), ours (B, H, L, D); its delta rule scales queries by 1/√D.


def swapped(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theirs", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_the_gated_delta_rule_is_that_of_transformers(form, theirs):
    peer = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, a = (x.detach() for x in draw("gated delta rule", 75, torch.float32, Hkv=H).values())
    start = torch.randn(B, H, D, DV)
    expected, last = getattr(peer, theirs)(
        *swapped(q, k, v), *(x.transpose(1, 2) for x in (a, beta)), initial_state=start, output_final_state=True
    )
    found, state = delta_rule_attention(
        q, k, v, beta, log_decay=a, scale=D**-0.5, form=form, chunk_size=16, state=start, return_state=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_state_space_duality_is_that_of_transformers(form):
    # theirs: x is our value over Δ, Δ A our log_decay, B our key, C our query; the state is (B, H, Dv, D)
    peer = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    q, k, x = (x.detach() for x in list(draw("ssd", 75, torch.float32).values())[:3])
    q = q[:, :1].expand(B, HKV, 75, D)  # a group of heads shares C, so that B and C have as many heads in theirs
    step, rate = torch.rand(B, 75, HKV), -torch.rand(HKV)
    start = torch.randn(B, HKV, DV, D)
    expected, last = peer.mamba2_chunk_scan(
        x.transpose(1, 2), step, rate, *swapped(k, q), chunk_size=16, initial_states=start, return_final_states=True
    )
    step = step.transpose(1, 2)
    found, state = ssd_attention(
        q, k, x * step[..., None], step * rate[:, None], form=form, chunk_size=8, state=start.mT, return_state=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last.mT, rtol=1e-5, atol=1e-5)


def test_segment_decays_are_those_of_transformers():
    peer = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    a = torch.rand(2, 3, 13, dtype=torch.float64).log()
    torch.testing.assert_close(segment_decays(a), peer.segment_sum(a).exp(), rtol=1e-12, atol=1e-12)


# flash-linear-attention (fla) needs a GPU, so it cannot run here. Read in its repository, fla/ops/*/naive.py: of
# delta_rule, delta_rule_recurrence; of gla, naive_recurrent_gla; of simple_gla, naive_recurrent_simple_gla. Its q, k,
# v, beta are ours; gk is the log_decay of gated_linear_attention, g that of ssd_attention; its initial and final states
# have our axes, (B, H, D, Dv); by default it scales q by 1/√D, our scale=D**-0.5. The first takes (B, H, L, D), the
# others (B, L, H, D). The three recurrences are, line by line, those of attnbook.reference.


def test_gated_linear_attention_is_the_papers_parallel_form():
    # O = ((Q ∘ B) (K / B)ᵀ ∘ M) V with B the cumulative products of the decays: fit for mild decays and short sequences
    given = draw("gated linear", 12, Hkv=H)
    with torch.no_grad():
        given["log_decay"].clamp_(min=-1)
    q, k, v, a = given.values()
    b = a.cumsum(2).exp()
    expected = ((q * b) @ (k / b).mT).tril() @ v
    torch.testing.assert_close(gated_linear_attention(**given), expected, rtol=1e-10, atol=1e-10)


# Errors.

QKV = {"query": torch.zeros(2, 4, 3, 8), "key": torch.zeros(2, 2, 3, 8), "value": torch.zeros(2, 2, 3, 5)}
GATE = torch.zeros(2, 4, 3)
BAD = {
    "key: expected as many positions as query has, S = L = 3, got shape (2, 2, 4, 8)": {
        "key": torch.zeros(2, 2, 4, 8),
        "value": torch.zeros(2, 2, 4, 5),
    },
    "attn_mask: expected a mask of keys, …, got bool tensor of shape (3, 3)": {
        "attn_mask": torch.ones(3, 3, dtype=torch.bool)
    },
    "form: expected one of 'parallel', 'chunked', 'recurrent', got 'fast'": {"form": "fast"},
    "chunk_size: expected an integer ≥ 1, got 0": {"chunk_size": 0},
    "state: expected a floating tensor (B, H, D, Dv) = (2, 4, 8, 5), got float32 tensor of shape (2, 4, 5, 8)": {
        "state": torch.zeros(2, 4, 5, 8)
    },
    "state: expected no NaN, got 320 NaN of 320 elements": {"state": torch.full((2, 4, 8, 5), math.nan)},
    "log_decay: expected a floating tensor, got -0.1": {"log_decay": -0.1},
    "log_decay: expected a floating tensor, got int64 tensor of shape (3,)": {"log_decay": torch.zeros(3).long()},
    "log_decay: expected broadcastable to (B, H, L) = (2, 4, 3), got float32 tensor of shape (2, 4, 3, 8)": {
        "log_decay": torch.zeros(2, 4, 3, 8)
    },
    "log_decay: expected no NaN, got 24 NaN of 24 elements": {"log_decay": GATE * math.nan},
    "log_decay: expected numbers ≤ 0 (a decay exp(log_decay) is at most 1), got one of 0.25": {
        "log_decay": GATE + 0.25
    },
    "beta: expected a floating tensor, got None": {"beta": None},
    "beta: expected finite numbers, got 24 of 24 that are not": {"beta": GATE + math.inf},
    "beta: expected broadcastable to (B, H, L) = (2, 4, 3), got float32 tensor of shape (2, 3)": {
        "beta": torch.zeros(2, 3)
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        delta_rule_attention(**{**QKV, "beta": GATE, **arguments})


def test_bad_decays_are_named():
    with complains("log_decay: expected a floating tensor, got None"):
        ssd_attention(**QKV, log_decay=None)
    with complains("log_decay: expected broadcastable to (B, H, L, D) = (2, 4, 3, 8), got … of shape (2, 4, 3)"):
        gated_linear_attention(**QKV, log_decay=GATE)
    with complains("gamma: expected a floating tensor (H,) = (4,), got float32 tensor of shape (2,)"):
        retention_attention(**QKV, gamma=torch.ones(2))
    with complains("gamma: expected numbers in (0, 1], got [0.5, 1.0, 1.5, 0.0]"):
        retention_attention(**QKV, gamma=torch.tensor([0.5, 1.0, 1.5, 0.0]))
    with complains("heads: expected an integer ≥ 1, got 0"):
        retention_gammas(0)
