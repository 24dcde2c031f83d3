"""Argument checks, and the texts of their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attnbook import shapes
from helpers import complains


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "float32 tensor of shape (2, 3)"),
        (torch.zeros((), dtype=torch.bool), "bool tensor of shape ()"),
        (None, "None"),
        (True, "True"),
        (3, "3"),
        (0.5, "0.5"),
        ("a", "'a'"),
        ((1, 2), "(1, 2)"),
        ([1], "list"),
        (np.zeros(2), "ndarray"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
)
def test_describe(value, text):
    assert shapes.describe(value) == text


def test_mismatch_names_argument_expected_and_actual():
    assert str(shapes.mismatch("width", "an even integer", 3)) == "width: expected an even integer, got 3"
    assert str(shapes.mismatch("x", "y", "as it is")) == "x: expected y, got as it is"
    assert isinstance(shapes.mismatch("a", "b", None), ValueError)


@pytest.mark.parametrize(
    ("axes", "shape"), [("B L", (2, 3)), ("... D", (4,)), ("... L D", (2, 3, 4)), ("...", ()), ("...", (2, 3))]
)
def test_check_tensor_returns_what_fits(axes, shape):
    tensor = torch.zeros(shape)
    assert shapes.check_tensor("x", tensor, axes) is tensor


@pytest.mark.parametrize(
    ("tensor", "axes", "text"),
    [
        ([1.0], "B L", "x: expected a tensor (B, L), got list"),
        (torch.zeros(2), "B L", "x: expected a tensor (B, L), got float32 tensor of shape (2,)"),
        (torch.zeros(2, 3, 4), "B L", "x: expected a tensor (B, L), got float32 tensor of shape (2, 3, 4)"),
        (torch.zeros(3), "... L D", "x: expected a tensor (..., L, D), got float32 tensor of shape (3,)"),
        (
            torch.zeros(2, 0),
            "B L",
            "x: expected a tensor (B, L) with no empty axis, got float32 tensor of shape (2, 0)",
        ),
        (
            torch.zeros(2, dtype=torch.int32),
            "B",
            "x: expected a float64 or float32 or float16 or bfloat16 tensor, got int32 tensor of shape (2,)",
        ),
    ],
)
def test_check_tensor_complains(tensor, axes, text):
    with complains(text):
        shapes.check_tensor("x", tensor, axes)


def test_check_tensor_admits_any_type_on_request():
    tensor = torch.zeros(2, dtype=torch.complex64)
    assert shapes.check_tensor("x", tensor, "B", dtypes=None) is tensor


def test_check_choice():
    assert shapes.check_choice("x", "a", ("a", "b")) == "a"
    with complains("x: expected one of 'a', 'b', got 'c'"):
        shapes.check_choice("x", "c", ("a", "b"))
    with complains("x: expected one of 'a', 'b', got 1"):
        shapes.check_choice("x", 1, ("a", "b"))


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, math.nan])
def test_check_count_complains(value):
    with complains(f"x: expected an integer ≥ 1, got {value!r}"):
        shapes.check_count("x", value)


def test_check_count_has_a_least_value():
    assert shapes.check_count("x", 0, least=0) == 0
    with complains("x: expected an integer ≥ 2, got 1"):
        shapes.check_count("x", 1, least=2)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, True, None, "0.5", math.nan])
def test_check_probability_complains(value):
    with complains(f"p: expected a number in [0, 1), got {value!r}"):
        shapes.check_probability("p", value)


@pytest.mark.parametrize("value", [0, 0.0, 0.999])
def test_check_probability_returns_a_float(value):
    found = shapes.check_probability("p", value)
    assert type(found) is float
    assert found == value


def test_check_attention_returns_the_sizes():
    q, k, v = torch.zeros(2, 6, 3, 4), torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 7)
    assert shapes.check_attention(q, k, v) == (2, 6, 3, 3, 5, 4, 7)
    assert shapes.check_attention(q, k, v)._fields == ("B", "H", "Hkv", "L", "S", "D", "Dv")


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (3, 1, 5), (2, 3, 4, 5)])
def test_check_broadcastable_gives_the_rank_of_the_target_and_copies_nothing(shape):
    tensor = torch.randn(shape)
    found = shapes.check_broadcastable("x", tensor, (2, 3, 4, 5), "B H L S")
    assert found.shape == (1,) * (4 - len(shape)) + shape
    assert found.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("shape", [(4,), (3, 5), (5, 1), (1, 2, 3, 4, 5), (0,)])
def test_check_broadcastable_complains(shape):
    with complains(
        f"x: expected broadcastable to (B, H, L, S) = (2, 3, 4, 5), got float32 tensor of shape {tuple(shape)}"
    ):
        shapes.check_broadcastable("x", torch.zeros(shape), (2, 3, 4, 5), "B H L S")


def test_check_mask_and_check_bias_take_only_their_kind():
    target = (1, 1, 2, 2)
    with complains("m: expected a bool tensor (True = may attend), got int64 tensor of shape (2,)"):
        shapes.check_mask("m", torch.ones(2, dtype=torch.int64), target)
    with complains("b: expected a floating tensor (a mask goes to attn_mask), got int64 tensor of shape (2,)"):
        shapes.check_bias("b", torch.ones(2, dtype=torch.int64), target)
    assert shapes.check_mask("m", torch.ones(2, dtype=torch.bool), target).shape == (1, 1, 1, 2)
    assert shapes.check_bias("b", torch.ones(2), target).shape == (1, 1, 1, 2)


@pytest.mark.parametrize("dtype", shapes.FLOATS, ids=str)
def test_check_no_nan_counts(dtype):
    tensor = torch.zeros(2, 3, dtype=dtype)
    assert shapes.check_no_nan("x", tensor) is tensor
    tensor[0, 1] = tensor[1, 2] = math.nan
    with complains("x: expected no NaN, got 2 NaN of 6 elements"):
        shapes.check_no_nan("x", tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_check_no_nan_lets_infinities_and_large_sums_pass(dtype):
    shapes.check_no_nan("x", torch.tensor([math.inf, -math.inf], dtype=dtype))
    shapes.check_no_nan("x", torch.full((4096,), 60000.0, dtype=dtype))
    largest = torch.finfo(torch.float32).max
    shapes.check_no_nan("x", torch.tensor([largest, largest, -largest, -largest]))


def test_values_are_not_looked_at_where_that_is_dear_or_impossible():
    assert shapes.values_are_readable(torch.zeros(1))
    assert shapes.values_are_readable(torch.nn.Parameter(torch.zeros(1)))
    assert not shapes.values_are_readable(torch.zeros(1, device="meta"))
    meta = torch.zeros(1, device="meta")
    assert shapes.check_no_nan("x", meta) is meta
    seen = []
    torch.vmap(lambda x: seen.append(shapes.values_are_readable(x)) or x)(torch.zeros(2))
    assert seen == [False]
