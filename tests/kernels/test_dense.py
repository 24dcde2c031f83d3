"""The Triton kernels of dense attention: in Triton's interpreter, or on a GPU where there is one (see conftest.py)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import attnbook
from attnbook import masks
from helpers import array, assert_close, complains, name_of

pytest.importorskip("triton")
from attnbook.kernels import triton_attention
from attnbook.kernels.common import INTERPRETED
from attnbook.kernels.dense import HALF, SINGLE, Tile, Tiles, tiles_for

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
SMALL = Tiles(*[Tile(32, 32)] * 3)
SLOPES = torch.tensor([0.5, 0.03])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_()


def inputs(L: int, S: int, D: int = 8, Dv: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return draw(1, 2, L, D, dtype=dtype), draw(1, 1, S, D, dtype=dtype), draw(1, 1, S, Dv, dtype=dtype)


def check(q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Hold output and gradients against NumPy's; window and slopes become a mask and a bias there."""
    L, S = q.shape[2], k.shape[2]
    plain = {name: x for name, x in options.items() if name not in ("window", "alibi_slopes", "tiles")}
    if "window" in options:
        near = masks.sliding_window(L, S, window=options["window"], causal=options.get("is_causal", False))
        plain["attn_mask"] = near & plain["attn_mask"].cpu() if "attn_mask" in plain else near
    if "alibi_slopes" in options:
        falling = -options["alibi_slopes"][:, None, None] * masks.relative_positions(L, S).abs()
        plain["bias"] = falling + plain["bias"].cpu() if "bias" in plain else falling
    plain = {name: array(x.cpu()) if isinstance(x, Tensor) else x for name, x in plain.items()}
    grad = torch.randn(*q.shape[:3], v.shape[3]).to(DEVICE, q.dtype)
    output = triton_attention(q, k, v, **{"tiles": SMALL, **options})
    found = torch.autograd.grad(output, (q, k, v), grad)
    assert output.dtype == q.dtype
    arrays = [array(x.cpu()) for x in (q, k, v)]
    assert_close(output.cpu(), attnbook.reference.attention(*arrays, **plain))
    expected = attnbook.reference.attention_gradients(*arrays, array(grad.cpu()), **plain)
    for name, x, wanted in zip("qkv", found, expected, strict=True):
        assert_close(x.cpu(), wanted, gradient=True, name=name)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((63, 63), {}),
        ((100, 100), {"is_causal": True}),
        ((20, 50), {"is_causal": True}),
        ((50, 20), {"is_causal": True}),  # the first 30 queries see nothing
        ((1, 63), {"is_causal": True}),
        ((63, 1), {}),
        ((1, 1), {"is_causal": True}),
        ((63, 63), {"is_causal": True, "window": 20}),
        ((30, 63), {"is_causal": True, "window": 1}),
        ((63, 40), {"window": 9}),
        ((40, 63), {"alibi_slopes": SLOPES}),
        ((63, 40), {"alibi_slopes": SLOPES, "is_causal": True, "window": 30, "scale": 0.7}),
    ],
    ids=str,
)
def test_the_kernels_compute_what_numpy_does(lengths, options):
    check(*inputs(*lengths), **options)


def test_the_sizes_of_tiles_change_nothing():
    check(*inputs(50, 40), is_causal=True, window=30, tiles=Tiles(Tile(16, 32), Tile(32, 16), Tile(16, 16)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": 20, "alibi_slopes": SLOPES}], ids=["", "more"])
def test_half_precision(dtype, options):
    check(*inputs(40, 63, dtype=dtype), **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": 30, "alibi_slopes": SLOPES}], ids=["", "more"])
@pytest.mark.parametrize("shape", [(50,), (2, 40, 50)], ids=name_of)
def test_masks_and_biases_are_read_along_the_axes_they_have(shape, options):
    mask = torch.rand(shape) < 0.6
    if shape[-2:] == (40, 50):
        mask[:, ::3] = False  # empty rows, in some tiles or in all
    bias = torch.randn(shape)
    check(*inputs(40, 50), attn_mask=mask.to(DEVICE), bias=bias.to(DEVICE), **options)


@pytest.mark.parametrize("sizes", [(40, 70), (128, 16)], ids=name_of)
def test_heads_of_any_size(sizes):
    check(*inputs(20, 20, *sizes), is_causal=True)


def test_heads_are_grouped():
    q, k, v = draw(2, 4, 20, 8), draw(2, 2, 20, 8), draw(2, 2, 20, 6)
    check(q, k, v, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_default_tiles_fit(dtype):
    check(*inputs(100, 140, dtype=dtype), is_causal=True, tiles=None)


def test_tables_of_tiles_cover_every_size_and_grow_no_larger():
    for table in (HALF, SINGLE):
        assert sorted(table) == [64, 128, 256]
        for small, large in pairwise(table[size] for size in sorted(table)):
            for a, b in zip(small, large, strict=True):
                assert a.rows * a.columns >= b.rows * b.columns
    q = torch.zeros(1, 1, 1, 65, dtype=torch.float16)
    assert tiles_for(q, q[..., :3]) == HALF[128]
    assert tiles_for(q.float()[..., :3], q.float()) == SINGLE[128]
    assert [tile.stages for tile in tiles_for(q, q, pairs=True)] == [tile.stages - 1 for tile in HALF[128]]


def test_views_are_read_where_they_lie_and_inputs_are_left_alone():
    q = draw(1, 40, 2, 8).transpose(1, 2)
    k = draw(1, 40, 1, 8).transpose(1, 2)
    v = draw(1, 1, 6, 40).transpose(2, 3)  # its last axis is not contiguous: copied
    before = [x.detach().clone() for x in (q, k, v)]
    check(q, k, v, is_causal=True)
    check(q, k.expand(1, 2, 40, 8), v.expand(1, 2, 40, 6))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("shape", [(), (21, 1), (2, 1, 33), (1, 2, 21, 33)], ids=str)
def test_the_gradient_of_a_bias_is_summed_over_its_repetitions(shape):
    q, k, v = inputs(21, 33)
    bias, grad = draw(*shape), torch.randn(1, 2, 21, 6, device=DEVICE)
    output = triton_attention(q, k, v, bias=bias, is_causal=True, tiles=SMALL)
    (found,) = torch.autograd.grad(output, bias, grad)
    wide = bias.detach().double().requires_grad_()
    operands = (x.detach().double() for x in (q, k, v))
    output = attnbook.attention(*operands, bias=wide, is_causal=True, backend="reference")
    (expected,) = torch.autograd.grad(output, wide, grad.double())
    assert found.shape == bias.shape
    assert_close(found.cpu(), expected.cpu(), gradient=True)


def test_empty_rows_give_exact_zeros_and_send_none_back():
    q, k, v = inputs(40, 50)
    mask = torch.rand(40, 50) < 0.6
    mask[::3] = False
    for options in ({"attn_mask": mask.to(DEVICE)}, {"bias": masks.to_bias(mask).to(DEVICE)}):
        output = triton_attention(q, k, v, tiles=SMALL, **options)
        assert (output[:, :, ::3] == 0).all()
        assert (output[:, :, 1::3] != 0).all()
        for gradient in torch.autograd.grad(output[:, :, ::3].sum(), (q, k, v)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_finite_scale(scale):
    check(*inputs(20, 33), is_causal=True, scale=scale)


def test_tiles_out_of_reach_are_never_loaded():
    q, k, v = inputs(96, 96)
    v = v.detach().clone()
    v[:, :, :32] = torch.nan  # one touch, and 0 · NaN would show
    v[:, :, 80:] = torch.nan
    output = triton_attention(q, k, v, is_causal=True, window=17, tiles=Tiles(*[Tile(16, 16)] * 3))
    assert output[:, :, 48:80].isfinite().all()
    assert output[:, :, 80:].isnan().all()


def test_half_precision_is_summed_in_float32():
    q, k = torch.zeros(1, 1, 1, 16, device=DEVICE), torch.zeros(1, 1, 4096, 16, device=DEVICE)
    v = torch.ones(1, 1, 4096, 16, device=DEVICE)
    output = triton_attention(q.half(), k.half(), v.half(), tiles=Tiles(*[Tile(16, 256)] * 3))
    assert (output == 1).all()


def test_gradients_that_nobody_wants_are_left_out():
    q, k, v = inputs(9, 9)
    bias = torch.zeros(9, 9, device=DEVICE)
    (gradient,) = torch.autograd.grad(triton_attention(q.detach(), k, v, bias=bias).sum(), k)
    assert gradient.shape == k.shape


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = inputs(3, 3)
    (gradient,) = torch.autograd.grad(triton_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


GOOD = torch.zeros(2, 4, 3, 8, device=DEVICE)
BAD = {
    "query: expected a float32 or float16 or bfloat16 tensor, got float64 tensor of shape (2, 4, 3, 8)": {
        "query": GOOD.double()
    },
    "key: expected last axis D = 8, that of query, got shape (2, 4, 3, 5)": {"key": GOOD[..., :5]},
    "value: expected heads of at most 256 components, got float32 tensor of shape (2, 4, 3, 300)": {
        "value": torch.zeros(2, 4, 3, 300, device=DEVICE)
    },
    "bias: expected broadcastable to (B, H, L, S) = (2, 4, 3, 3), got float32 tensor of shape (2, 3)": {
        "bias": torch.zeros(2, 3)
    },
    "bias: expected device …, that of query, got device meta": {"bias": torch.zeros(3, 3, device="meta")},
    "attn_mask: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 3)": {
        "attn_mask": torch.ones(3, 3)
    },
    "alibi_slopes: expected H = 4 numbers that want no gradient, got float32 tensor of shape (3,)": {
        "alibi_slopes": torch.ones(3)
    },
    "alibi_slopes: expected H = 4 numbers that want no gradient, got float32 tensor of shape (4,)": {
        "alibi_slopes": torch.ones(4, requires_grad=True)
    },
    "window: expected an integer ≥ 1, got 0": {"window": 0},
    "scale: expected a finite number, got inf": {"scale": float("inf")},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        triton_attention(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})


@pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies bfloat16 well")
def test_the_interpreter_is_not_trusted_with_bfloat16():
    with complains(
        "query: expected a float32 or float16 tensor (Triton's interpreter multiplies bfloat16 wrongly), got …"
    ):
        triton_attention(GOOD.bfloat16(), GOOD.bfloat16(), GOOD.bfloat16())
