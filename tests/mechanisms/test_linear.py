"""Linear attention: three forms, one function; and a state to decode with."""

from __future__ import annotations

import math

import pytest
import torch

from attnbook import reference
from attnbook.measure import count_flops, peak_memory
from attnbook.mechanisms import linear_attention
from attnbook.mechanisms.linear_forms import FEATURE_MAPS, FORMS, mapped
from helpers import DTYPES, array, assert_close, complains, name_of

OTHER_FORMS = [
    (form, size) for form in ("chunked", "recurrent") for size in (1, 7, 64) if form == "chunked" or size == 1
]


def inputs(L: int, S: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64):
    return tuple(
        torch.randn(2, h, n, d, dtype=torch.float64).to(dtype).requires_grad_()
        for h, n, d in ((heads, L, 5), (kv_heads, S, 5), (kv_heads, S, 3))
    )


@pytest.mark.parametrize("form", OTHER_FORMS, ids=str)
@pytest.mark.parametrize("feature_map", ["elu1", torch.square], ids=["named", "given"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(20, 20), (9, 20), (20, 9), (1, 20), (20, 1)], ids=name_of)
def test_the_forms_agree(form, feature_map, is_causal, lengths):
    q, k, v = inputs(*lengths)
    grad = torch.randn(2, 4, lengths[0], 3, dtype=torch.float64)
    options = {"feature_map": feature_map, "is_causal": is_causal}
    expected = linear_attention(q, k, v, form="parallel", **options)
    output = linear_attention(q, k, v, form=form[0], chunk_size=form[1], **options)
    assert_close(output, expected)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    for found, right in zip(torch.autograd.grad(output, (q, k, v), grad), wanted, strict=True):
        assert_close(found, right, gradient=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_form_and_map_computes_what_is_specified(form, name):
    q, k, v = inputs(11, 13)
    mask = torch.rand(2, 4, 1, 13) < 0.6
    mask[0, 0] = False
    options = {"feature_map": name, "is_causal": True}
    for more in ({}, {"attn_mask": mask}):
        output = linear_attention(q, k, v, form=form, chunk_size=4, **options, **more)
        assert_close(output, reference.linear_attention(*map(array, (q, k, v)), **options, **more))


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 7), (1, 3, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_sequence_may_be_cut_where_the_state_is_carried(form, cuts, dtype):
    q, k, v = (x.detach() for x in inputs(12, 12, dtype=dtype))
    whole, last = linear_attention(q, k, v, is_causal=True, return_state=True)
    state, parts = None, []
    for piece in zip(*(x.split(cuts, 2) for x in (q, k, v)), strict=True):
        options = {"is_causal": True, "form": form, "chunk_size": 2, "state": state, "return_state": True}
        part, state = linear_attention(*piece, **options)
        parts.append(part)
    assert_close(torch.cat(parts, 2), whole)
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert state.shape == (2, 4, 5, 4)
    assert_close(state, last)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_a_state_holds_what_earlier_keys_left(form):
    q, k, v = inputs(6, 15)
    _, state = linear_attention(q, k[:, :, :9], v[:, :, :9], form=form, return_state=True)
    for is_causal in (False, True):  # the last six keys belong to the six queries
        rest, whole = {"form": form, "is_causal": is_causal, "state": state}, {"form": form, "is_causal": is_causal}
        output = linear_attention(q, k[:, :, 9:], v[:, :, 9:], **rest)
        assert_close(output, linear_attention(q, k, v, **whole))
    early = linear_attention(q, k[:, :, 12:], v[:, :, 12:], is_causal=True, form=form, state=state)[:, :, :3]
    assert_close(early, linear_attention(q[:, :, :3], k[:, :, :9], v[:, :, :9]))  # queries before all new keys


@pytest.mark.parametrize("chunk_size", [2, 3, 8])
@pytest.mark.parametrize("lengths", [(5, 5), (3, 5), (5, 3)], ids=name_of)
def test_gradcheck_through_the_state(chunk_size, lengths):
    q, k, v = inputs(*lengths, heads=2, kv_heads=1)
    state = torch.rand(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, state):
        return linear_attention(q, k, v, is_causal=True, chunk_size=chunk_size, state=state, return_state=True)

    assert torch.autograd.gradcheck(call, (q, k, v, state))


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = inputs(3, 3)
    (gradient,) = torch.autograd.grad(linear_attention(q, k, v, is_causal=True).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_rows_without_weight_give_zero_and_send_no_gradient(form, is_causal):
    q, k, v = inputs(9, 9)
    with torch.no_grad():
        q[:, :, 4] = -1.0  # relu makes nothing of it
        k[:, :, 0] = -1.0
    output = linear_attention(q, k, v, feature_map="relu", is_causal=is_causal, form=form, chunk_size=4)
    assert (output[:, :, 4] == 0).all()
    if is_causal:
        assert (output[:, :, 0] == 0).all()
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_elu1_stays_positive_where_elu_plus_one_rounds_to_zero():
    x = torch.tensor([-30.0, -20.0, 0.0, 3.0])
    assert (torch.nn.functional.elu(x) + 1)[0] == 0
    assert mapped(x, FEATURE_MAPS["elu1"]).tolist() == pytest.approx([math.exp(-30), math.exp(-20), 1, 4], rel=1e-6)


def test_scaling_features_changes_nothing():
    q, k, v = inputs(9, 9)
    scaled = linear_attention(q, k, v, feature_map=lambda x: 1e-3 * x.exp(), is_causal=True)
    assert_close(scaled, linear_attention(q, k, v, feature_map="exp", is_causal=True))


def test_an_infinite_map_of_exp_gives_softmax():
    # exp(q·k) is a sum over the terms of its power series: with all monomials up to a degree, the error is the rest's.
    q, k, v = (x.detach() * 0.3 for x in inputs(6, 6, heads=2))
    expected = reference.attention(*map(array, (q, k, v)), scale=1.0, is_causal=True)

    def powers(degree):
        def feature_map(x):
            terms = [torch.ones_like(x[..., :1])]
            for n in range(1, degree + 1):  # all products of n coordinates, over √n!
                terms.append((terms[-1][..., None] * x[..., None, :]).flatten(-2) / n**0.5)
            return torch.cat(terms, -1)

        return feature_map

    def error(degree):
        output = linear_attention(q, k, v, feature_map=powers(degree), is_causal=True)
        return abs(array(output) - expected).max()

    errors = [error(degree) for degree in (2, 4, 6)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_time_and_memory_grow_linearly():
    def call(n):
        q = torch.ones(1, 1, n, 8, requires_grad=True)
        return lambda: torch.autograd.grad(linear_attention(q, q, q, is_causal=True, chunk_size=32).sum(), q)

    assert count_flops(call(1024)) == 4 * count_flops(call(256))
    small, large = peak_memory(call(512)), peak_memory(call(2048))
    assert large < 4.5 * small
    assert large < 2048 * 2048 * 4 / 4  # far below the matrix of weights


def test_decoding_costs_the_same_at_every_position():
    q = torch.ones(1, 2, 1, 8)
    state = torch.ones(1, 2, 8, 9)
    step = {"is_causal": True, "state": state, "return_state": True}
    assert peak_memory(lambda: linear_attention(q, q, q, **step)) < 20_000  # no trace of what came before


def test_inputs_are_unchanged():
    q, k, v = (x.detach() for x in inputs(9, 9))
    state = torch.rand(2, 4, 5, 4, dtype=torch.float64)
    before = [x.clone() for x in (q, k, v, state)]
    for form in ("chunked", "recurrent"):
        linear_attention(q, k, v, is_causal=True, form=form, chunk_size=4, state=state, return_state=True)
    for now, then in zip((q, k, v, state), before, strict=True):
        assert torch.equal(now, then)


GOOD = torch.zeros(2, 4, 3, 8)
BAD = {
    "query: expected a tensor (B, H, L, D), got float32 tensor of shape (4, 3, 8)": {"query": GOOD[0]},
    "key: expected no NaN, got 192 NaN of 192 elements": {"key": GOOD * float("nan")},
    "attn_mask: expected a mask of keys, (…, 1, S), the same for all queries: … got bool tensor of shape (3, 3)": {
        "attn_mask": torch.ones(3, 3, dtype=torch.bool)
    },
    "feature_map: expected one of 'elu1', 'relu', 'exp', got 'softmax'": {"feature_map": "softmax"},
    "feature_map: expected a function that makes a float32 tensor (2, 4, 3, F) of query, got float32 tensor of …": {
        "feature_map": torch.sum
    },
    "feature_map: expected a function that makes a float32 tensor (2, 4, 3, F) of query, got float64 tensor of shape "
    "(2, 4, 3, 8)": {"feature_map": torch.Tensor.double},
    "feature_map: expected as many features of keys as of queries, 8, got 4": {
        "key": GOOD + 1,
        "feature_map": lambda x: x[..., : 8 if x.max() == 0 else 4],
    },
    "form: expected one of 'parallel', 'chunked', 'recurrent', got 'quadratic'": {"form": "quadratic"},
    "form: expected 'chunked' or 'recurrent' where a state is carried, got 'parallel'": {
        "form": "parallel",
        "return_state": True,
    },
    "chunk_size: expected an integer ≥ 1, got 0": {"chunk_size": 0},
    "state: expected (B, H, F, Dv + 1) = (2, 4, 8, 9), got shape (2, 4, 8, 8)": {"state": torch.zeros(2, 4, 8, 8)},
    "state: expected a float32 tensor, got float64 tensor of shape (2, 4, 8, 9)": {
        "state": torch.zeros(2, 4, 8, 9, dtype=torch.float64)
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        linear_attention(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})
