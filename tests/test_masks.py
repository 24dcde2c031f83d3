"""Masks against loops that say what they mean."""

from __future__ import annotations

import math

import pytest
import torch

from attnbook import masks
from helpers import complains

SIZES = [(1, None), (5, None), (5, 5), (3, 7), (7, 3), (1, 6), (6, 1)]


def table(L: int, S: int, rule) -> torch.Tensor:
    return torch.tensor([[bool(rule(i, j)) for j in range(S)] for i in range(L)])


@pytest.mark.parametrize(("L", "S"), SIZES)
@pytest.mark.parametrize("align", ["end", "start"])
def test_causal(L, S, align):
    keys = S or L
    shift = keys - L if align == "end" else 0
    found = masks.causal(L, S, align=align)
    assert found.dtype == torch.bool
    assert torch.equal(found, table(L, keys, lambda i, j: j <= i + shift))


def test_causal_aligns_ends_unless_told():
    assert masks.causal(2, 4)[-1].all()
    assert masks.causal(2, 4, align="start")[0].tolist() == [True, False, False, False]
    assert not masks.causal(4, 2)[:2].any()


@pytest.mark.parametrize(("L", "S"), SIZES)
@pytest.mark.parametrize("align", ["end", "start"])
def test_relative_positions(L, S, align):
    keys = S or L
    shift = keys - L if align == "end" else 0
    expected = torch.tensor([[i + shift - j for j in range(keys)] for i in range(L)])
    assert torch.equal(masks.relative_positions(L, S, align=align), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_padding(dtype):
    lengths = [3, 0, 5, 1]
    found = masks.padding(torch.tensor(lengths, dtype=dtype), 5)
    assert found.shape == (4, 1, 1, 5)
    assert torch.equal(found[:, 0, 0], torch.tensor([[j < n for j in range(5)] for n in lengths]))


def test_padding_is_as_long_as_the_longest_unless_told():
    assert masks.padding(torch.tensor([2, 4])).shape == (2, 1, 1, 4)
    assert masks.padding(torch.tensor([2, 4]), 7).shape == (2, 1, 1, 7)
    assert not masks.padding(torch.tensor([0, 0])).any()


@pytest.mark.parametrize(("L", "S"), SIZES)
@pytest.mark.parametrize("window", [1, 2, 4, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window(L, S, window, causal):
    keys = S or L
    behind = lambda i, j: i + keys - L - j  # noqa: E731
    rule = (lambda i, j: 0 <= behind(i, j) < window) if causal else (lambda i, j: abs(behind(i, j)) < window)
    assert torch.equal(masks.sliding_window(L, S, window=window, causal=causal), table(L, keys, rule))


@pytest.mark.parametrize(("L", "S"), SIZES)
@pytest.mark.parametrize("prefix_length", [0, 1, 3, 100])
def test_prefix(L, S, prefix_length):
    keys = S or L
    expected = table(L, keys, lambda i, j: j <= i + keys - L or j < prefix_length)
    assert torch.equal(masks.prefix(L, S, prefix_length=prefix_length), expected)


def test_document():
    ids = torch.tensor([[0, 0, 1, 1, 1], [4, 2, 2, 4, 2]])
    found = masks.document(ids)
    assert found.shape == (2, 1, 5, 5)
    for row, mask in zip(ids.tolist(), found[:, 0], strict=True):
        assert torch.equal(mask, table(5, 5, lambda i, j, row=row: row[i] == row[j]))


@pytest.mark.parametrize(("L", "S"), [(None, None), (6, 9), (5, 7), (4, 8)])
def test_block(L, S):
    layout = torch.tensor([[True, False, True], [False, True, False]])
    found = masks.block(layout, block_size=3, L=L, S=S)
    assert torch.equal(found, table(L or 6, S or 9, lambda i, j: layout[i // 3, j // 3]))


def test_block_keeps_leading_axes():
    layout = torch.rand(2, 4, 3, 3) < 0.5
    found = masks.block(layout, block_size=2, L=5)
    assert found.shape == (2, 4, 5, 6)
    assert torch.equal(found[1, 2], masks.block(layout[1, 2], block_size=2, L=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_to_bias(dtype):
    mask = torch.tensor([[True, False], [False, False]])
    found = masks.to_bias(mask, dtype)
    assert found.dtype == dtype
    assert found.tolist() == [[0, -math.inf], [-math.inf, -math.inf]]


def test_masks_combine():
    ids = torch.tensor([[0, 0, 1, 1]])
    found = masks.causal(4) & masks.document(ids)
    assert found[0, 0].tolist() == table(4, 4, lambda i, j: j <= i and i // 2 == j // 2).tolist()


def test_masks_are_made_where_asked():
    for mask in (
        masks.causal(3, device="meta"),
        masks.sliding_window(3, window=2, device="meta"),
        masks.prefix(3, prefix_length=1, device="meta"),
    ):
        assert mask.device.type == "meta"


INTEGERS = "int64 or int32 or int16 or uint8"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: masks.causal(0), "L: expected an integer ≥ 1, got 0"),
        (lambda: masks.causal(3, 0), "S: expected an integer ≥ 1, got 0"),
        (lambda: masks.causal(2.0), "L: expected an integer ≥ 1, got 2.0"),
        (lambda: masks.causal(3, align="middle"), "align: expected one of 'end', 'start', got 'middle'"),
        (
            lambda: masks.padding(torch.tensor([1.0])),
            f"lengths: expected a {INTEGERS} tensor, got float32 tensor of shape (1,)",
        ),
        (lambda: masks.padding([1, 2]), "lengths: expected a tensor (B), got list"),
        (
            lambda: masks.padding(torch.ones(2, 2, dtype=torch.int64)),
            "lengths: expected a tensor (B), got int64 tensor of shape (2, 2)",
        ),
        (lambda: masks.padding(torch.tensor([1, -1]), 3), "lengths: expected integers in [0, S = 3], got [1, -1]"),
        (lambda: masks.padding(torch.tensor([4]), 3), "lengths: expected integers in [0, S = 3], got [4]"),
        (lambda: masks.padding(torch.tensor([1]), 0), "S: expected an integer ≥ 1, got 0"),
        (lambda: masks.sliding_window(3, window=0), "window: expected an integer ≥ 1, got 0"),
        (lambda: masks.sliding_window(0, window=1), "L: expected an integer ≥ 1, got 0"),
        (lambda: masks.prefix(3, prefix_length=-1), "prefix_length: expected an integer ≥ 0, got -1"),
        (
            lambda: masks.document(torch.zeros(2, 3)),
            f"ids: expected a {INTEGERS} tensor, got float32 tensor of shape (2, 3)",
        ),
        (
            lambda: masks.document(torch.zeros(3, dtype=torch.int64)),
            "ids: expected a tensor (B, L), got int64 tensor of shape (3,)",
        ),
        (
            lambda: masks.block(torch.ones(2, 2), block_size=2),
            "layout: expected a bool tensor, got float32 tensor of shape (2, 2)",
        ),
        (
            lambda: masks.block(torch.ones(2, dtype=torch.bool), block_size=2),
            "layout: expected a tensor (..., rows, columns), got bool tensor of shape (2,)",
        ),
        (
            lambda: masks.block(torch.ones(2, 2, dtype=torch.bool), block_size=0),
            "block_size: expected an integer ≥ 1, got 0",
        ),
        (
            lambda: masks.block(torch.ones(2, 2, dtype=torch.bool), block_size=3, L=3),
            "L: expected an integer in (3, 6], to fit the layout, got 3",
        ),
        (
            lambda: masks.block(torch.ones(2, 2, dtype=torch.bool), block_size=3, S=7),
            "S: expected an integer in (3, 6], to fit the layout, got 7",
        ),
        (lambda: masks.to_bias(torch.ones(2)), "mask: expected a bool tensor, got float32 tensor of shape (2,)"),
        (
            lambda: masks.to_bias(torch.ones(2, dtype=torch.bool), torch.int64),
            "dtype: expected a floating type of torch, got torch.int64",
        ),
        (
            lambda: masks.to_bias(torch.ones(2, dtype=torch.bool), "float32"),
            "dtype: expected a floating type of torch, got float32",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
