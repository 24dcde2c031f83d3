"""Tiled attention: whatever the size of a tile, the result of the whole."""

from __future__ import annotations

import pytest
import torch

import attnbook
from attnbook import masks
from attnbook.mechanisms import tiled_attention
from helpers import DTYPES, array, assert_close, complains, name_of

BLOCKS = (1, 7, 16, 64, 1000)


def inputs(L: int, S: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64, batch: int = 2):
    return tuple(
        torch.randn(batch, h, n, d).to(dtype).requires_grad_()
        for h, n, d in ((heads, L, 5), (kv_heads, S, 5), (kv_heads, S, 3))
    )


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(33, 33), (20, 50), (50, 20), (1, 33), (33, 1)], ids=name_of)
def test_every_tile_size_gives_the_reference(block_size, is_causal, lengths):
    q, k, v = inputs(*lengths)
    mask = torch.rand(2, 1, *lengths) < 0.5
    mask[1, :, ::4] = False  # rows that are empty, in some tiles or in all
    bias = torch.randn(4, *lengths, dtype=torch.float64)
    grad = torch.randn(2, 4, lengths[0], 3, dtype=torch.float64)
    options = {"attn_mask": mask, "bias": bias, "is_causal": is_causal}
    output = tiled_attention(q, k, v, block_size=block_size, **options)
    arrays = [array(x) for x in (q, k, v)]
    assert_close(output, attnbook.reference.attention(*arrays, **options))
    expected = attnbook.reference.attention_gradients(*arrays, array(grad), **options)
    for found, wanted in zip(torch.autograd.grad(output, (q, k, v), grad), expected, strict=True):
        assert_close(found, wanted, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_half_precision_is_summed_in_float32(dtype):
    # 4,000 equal weights of 1/4000: summed in bfloat16 they would stop growing at 256.
    q, k = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.zeros(1, 1, 4000, 2, dtype=dtype)
    v = torch.ones(1, 1, 4000, 1, dtype=dtype)
    assert tiled_attention(q, k, v, block_size=16).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "shape", [(), (1,), (9,), (7, 1), (1, 9), (7, 9), (2, 7, 9), (3, 1, 7, 9), (3, 2, 1, 9), (3, 2, 7, 1)], ids=str
)
def test_gradient_of_a_bias_is_summed_over_its_repetitions(shape):
    q, k, v = inputs(7, 9, heads=2, batch=3)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 2, 7, 3, dtype=torch.float64)
    found = torch.autograd.grad(tiled_attention(q, k, v, bias=bias, block_size=4), bias, grad)[0]
    expected = torch.autograd.grad(attnbook.attention(q, k, v, bias=bias, backend="reference"), bias, grad)[0]
    assert found.shape == bias.shape
    assert_close(found, expected, gradient=True)


def test_gradients_that_nobody_wants_are_left_out():
    q, k, v = inputs(7, 9)
    output = tiled_attention(q.detach(), k, v.detach(), bias=torch.zeros(7, 9, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(output.sum(), (k,))
    assert gradient.shape == k.shape


@pytest.mark.parametrize("block_size", [2, 5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(block_size, is_causal):
    q, k, v = inputs(4, 6, heads=2, kv_heads=1, batch=1)
    bias = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 6) < 0.6
    mask[2] = False

    def call(q, k, v, bias):
        return tiled_attention(q, k, v, attn_mask=mask, bias=bias, is_causal=is_causal, block_size=block_size)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = inputs(3, 3)
    (gradient,) = torch.autograd.grad(tiled_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_causal_skips_tiles_beyond_the_diagonal(monkeypatch):
    from attnbook.mechanisms.tiles import Tiles

    sizes = []
    original = Tiles.scores

    def counting(self, q, k, rows, columns, scale):
        sizes.append((rows.start, columns.start))
        return original(self, q, k, rows, columns, scale)

    monkeypatch.setattr(Tiles, "scores", counting)
    q, k, v = inputs(32, 32)
    tiled_attention(q, k, v, is_causal=True, block_size=8)
    assert sorted(sizes) == [(i, j) for i in range(0, 32, 8) for j in range(0, i + 1, 8)]
    sizes.clear()
    tiled_attention(q, k, v, block_size=8)
    assert len(sizes) == 16


def test_memory_grows_linearly():
    from attnbook.measure import peak_memory

    def peak(n: int) -> int:
        q = torch.zeros(1, 1, n, 8)
        return peak_memory(lambda: tiled_attention(q, q, q, block_size=64))

    small, large = peak(512), peak(2048)
    assert large < 6 * small  # 4 for linear, 16 for quadratic growth
    assert large < 2048 * 2048 * 4 / 8  # far below the matrix of weights


def test_inputs_are_unchanged_and_the_output_is_new():
    q, k, v = inputs(9, 9)
    mask, bias = torch.rand(9, 9) < 0.5, torch.randn(9, 9, dtype=torch.float64)
    before = [x.clone() for x in (q, k, v, mask, bias)]
    tiled_attention(q, k, v, attn_mask=mask, bias=bias, is_causal=True, block_size=4).sum().backward()
    for now, then in zip((q, k, v, mask, bias), before, strict=True):
        assert torch.equal(now, then)


def test_a_causal_mask_and_the_flag_agree():
    q, k, v = inputs(9, 13)
    flagged = tiled_attention(q, k, v, is_causal=True, block_size=4)
    masked = tiled_attention(q, k, v, attn_mask=masks.causal(9, 13), block_size=4)
    assert torch.equal(flagged, masked)


GOOD = torch.zeros(2, 4, 3, 8)
BAD = {
    "query: expected a tensor (B, H, L, D), got float32 tensor of shape (4, 3, 8)": {"query": GOOD[0]},
    "key: expected last axis D = 8, that of query, got shape (2, 4, 3, 5)": {"key": GOOD[..., :5]},
    "value: expected (Hkv, S) = (4, 3), those of key, got shape (2, 4, 2, 8)": {"value": GOOD[:, :, :2]},
    "key: expected no NaN, got 192 NaN of 192 elements": {"key": GOOD * float("nan")},
    "query: expected no NaN, got 192 NaN of 192 elements": {"query": GOOD * float("nan")},
    "bias: expected no NaN, got 9 NaN of 9 elements": {"bias": torch.full((3, 3), float("nan"))},
    "bias: expected a floating tensor (a mask goes to attn_mask), got bool tensor of shape (3, 3)": {
        "bias": torch.ones(3, 3, dtype=torch.bool)
    },
    "bias: expected broadcastable to (B, H, L, S) = (2, 4, 3, 3), got float32 tensor of shape (2, 3)": {
        "bias": torch.zeros(2, 3)
    },
    "attn_mask: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 3)": {
        "attn_mask": torch.ones(3, 3)
    },
    "attn_mask: expected broadcastable to (B, H, L, S) = (2, 4, 3, 3), got bool tensor of shape (4, 3)": {
        "attn_mask": torch.ones(4, 3, dtype=torch.bool)
    },
    "block_size: expected an integer ≥ 1, got 0": {"block_size": 0},
    "block_size: expected an integer ≥ 1, got 2.5": {"block_size": 2.5},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        tiled_attention(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})
