"""Attention: every backend against the NumPy reference, forward and backward."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import attnbook
from attnbook import masks
from attnbook.bench import choose
from attnbook.functional import backends, choice, naive_attention, repeat_heads
from attnbook.layers import MultiHeadAttention
from helpers import BACKENDS, DTYPES, array, assert_close, complains, name_of

B, D, DV = 2, 8, 6
LENGTHS = ((63, 63), (63, 100), (100, 63), (1, 100), (63, 1), (1, 1))
FEATURES = ("plain", "padding", "empty rows", "bias", "bias and mask", "non-contiguous", "expanded")


@cache
def case(dtype: torch.dtype, heads: tuple[int, int], lengths: tuple[int, int], feature: str, is_causal: bool):
    """Return inputs, options, and what NumPy makes of them: output and gradients."""
    (H, Hkv), (L, S) = heads, lengths
    generator = torch.Generator().manual_seed(L * 101 + S)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if feature == "non-contiguous":
        q, k, v = (draw(B, n, h, d).transpose(1, 2) for n, h, d in ((L, H, D), (S, Hkv, D), (S, Hkv, DV)))
    elif feature == "expanded":
        q, k = draw(1, H, L, D).expand(B, -1, -1, -1), draw(B, 1, S, D).expand(-1, Hkv, -1, -1)
        v = draw(1, Hkv, 1, DV).expand(B, -1, S, -1)
    else:
        q, k, v = draw(B, H, L, D), draw(B, Hkv, S, D), draw(B, Hkv, S, DV)
    options: dict = {"is_causal": is_causal}
    if feature == "padding":
        options["attn_mask"] = masks.padding(torch.tensor([S, S // 3]), S)  # none at all where S = 1
    elif feature == "empty rows":
        mask = torch.rand(B, 1, L, S, generator=generator) < 0.7
        mask[0, :, ::3] = False
        options["attn_mask"] = mask
    elif feature == "bias":
        options["bias"] = draw(H, L, S)
    elif feature == "bias and mask":
        options["bias"] = draw(B, 1, 1, S)
        options["attn_mask"] = torch.rand(H, L, S, generator=generator) < 0.5
    grad = draw(B, H, L, DV)
    inputs = [array(x) for x in (q, k, v)]
    plain = {name: array(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    output, weights = attnbook.reference.attention(*inputs, return_weights=True, **plain)
    gradients = list(attnbook.reference.attention_gradients(*inputs, array(grad), **plain))
    if "bias" in options:  # by the chain rule once more, and summed over the axes along which the bias was repeated
        dp = np.einsum("bhld,bhsd->bhls", array(grad), np.repeat(inputs[2], H // Hkv, 1))
        dz = weights * (dp - (weights * dp).sum(-1, keepdims=True))
        shape = (1,) * (4 - options["bias"].dim()) + tuple(options["bias"].shape)
        axes = tuple(i for i, size in enumerate(shape) if size == 1 and dz.shape[i] > 1)
        gradients.append(dz.sum(axes, keepdims=True).reshape(options["bias"].shape))
    return (q, k, v), options, grad, output, gradients, weights


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=name_of)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_equal_the_reference(backend, dtype, is_causal, heads, lengths, feature):
    inputs, options, grad, output, gradients, weights = case(dtype, heads, lengths, feature, is_causal)
    leaves = [x.detach().requires_grad_() for x in inputs]  # shares storage and strides with the input
    bias = options.get("bias")
    if bias is not None:
        options = {**options, "bias": bias.detach().requires_grad_()}
        leaves.append(options["bias"])
    before = [x.detach().clone() for x in leaves]
    ours = attnbook.attention(*leaves[:3], backend=backend, **options)
    assert ours.dtype == dtype
    found = torch.autograd.grad(ours, leaves, grad)
    assert_close(ours, output)
    for name, gradient, expected in zip(("query", "key", "value", "bias"), found, gradients, strict=False):
        assert_close(gradient, expected, gradient=True, name=f"gradient of {name}")
    empty = ~(weights.sum(-1) > 0)
    assert (array(ours)[empty] == 0).all()
    assert (array(found[0])[empty] == 0).all()
    for now, then in zip(leaves, before, strict=True):
        assert torch.equal(now, then), "an input was changed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [2, 1], ids=["mha", "mqa"])
def test_gradcheck(backend, heads):
    q, k, v = (
        torch.randn(1, n, s, 3, dtype=torch.float64, requires_grad=True) for n, s in ((2, 4), (heads, 5), (heads, 5))
    )
    bias = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) < 0.6
    mask[1] = False

    def call(q, k, v, bias):
        return attnbook.attention(q, k, v, attn_mask=mask, bias=bias, is_causal=True, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


def empty_row_options(how: str, dtype: torch.dtype) -> dict:
    """Return options under which query 1 of four, and no other, may attend to none of five keys."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    some = torch.tensor([True, False, True, False, False])
    return {
        "mask": {"attn_mask": mask},
        "mask without a key axis": {"attn_mask": mask[:, :1]},
        "bias of -inf": {"bias": masks.to_bias(mask, dtype)},
        "mask and bias of -inf": {"attn_mask": mask, "bias": masks.to_bias(mask, dtype)},
        "what the mask leaves, the bias takes": {
            "attn_mask": mask | some,
            "bias": masks.to_bias(mask | ~some, dtype),
        },
    }[how]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "how",
    [
        "mask",
        "mask without a key axis",
        "bias of -inf",
        "mask and bias of -inf",
        "what the mask leaves, the bias takes",
    ],
)
def test_a_query_with_nothing_to_attend_to_gives_zeros_and_gets_zero_gradient(backend, dtype, how):
    q, k, v = (torch.randn(2, 2, n, 4).to(dtype).requires_grad_() for n in (4, 5, 5))
    output = attnbook.attention(q, k, v, backend=backend, **empty_row_options(how, dtype))
    assert (output[:, :, 1] == 0).all()
    assert (output[:, :, [0, 2, 3]] != 0).any(-1).all()
    of_query, of_key, of_value = torch.autograd.grad(output[:, :, 1].sum(), (q, k, v), retain_graph=True)
    for gradient in (of_query, of_key, of_value):
        assert (gradient == 0).all()
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_weights_of_an_empty_row_are_zero(dtype):
    q, k, v = (torch.randn(2, 2, n, 4).to(dtype) for n in (4, 5, 5))
    _, weights = attnbook.attention(q, k, v, return_weights=True, **empty_row_options("mask", dtype))
    assert weights.dtype == dtype
    assert (weights[:, :, 1] == 0).all()
    assert_close(weights.sum(-1)[:, :, [0, 2, 3]], np.ones((2, 2, 3)), times=5)  # five rounded weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_everything_masked_gives_zeros(backend, dtype):
    q, k, v = (torch.randn(1, 2, 3, 4).to(dtype).requires_grad_() for _ in range(3))
    output = attnbook.attention(q, k, v, attn_mask=torch.tensor(False), backend=backend)
    assert (output == 0).all()
    for gradient in torch.autograd.grad(output.sum(), (q, k, v)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=name_of)
def test_causal_by_gradient(backend, lengths):
    L, S = lengths
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (L, S, S))
    output = attnbook.attention(q, k, v, is_causal=True, backend=backend)
    for i in range(L):
        of_query, of_key, of_value = torch.autograd.grad(output[:, :, i].square().sum(), (q, k, v), retain_graph=True)
        seen = max(i + S - L + 1, 0)
        assert (of_key[:, :, seen:] == 0).all()
        assert (of_value[:, :, seen:] == 0).all()
        assert (of_value[:, :, :seen] != 0).all()
        assert (of_query[:, :, [j for j in range(L) if j != i]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_masked_keys_get_no_weight_however_low_the_other_scores(backend, dtype):
    # A finite fill such as −1e9 overflows in float16, and is beaten by scores below it.
    bias = torch.tensor([-6e4 if dtype == torch.float16 else -1e30, 0.0]).to(dtype)
    q = torch.ones(1, 1, 1, 4, dtype=dtype)
    v = torch.tensor([1.0, 100.0], dtype=dtype).view(1, 1, 2, 1)
    mask = torch.tensor([True, False])
    output = attnbook.attention(q, torch.ones(1, 1, 2, 4, dtype=dtype), v, attn_mask=mask, bias=bias, backend=backend)
    assert output.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_large_scores_do_not_overflow(backend, dtype):
    q = torch.full((1, 1, 2, 4), 200.0, dtype=dtype)  # scores of 80,000, beyond float16
    k = torch.stack([q[0, 0, 0], -q[0, 0, 0]])[None, None]
    v = torch.tensor([[1.0], [2.0]], dtype=dtype)[None, None]
    output = attnbook.attention(q, k, v, backend=backend)
    assert output.flatten().tolist() == [1, 1]


MASK_SHAPES = (
    (),
    (5,),
    (1,),
    (4, 5),
    (4, 1),
    (1, 5),
    (2, 4, 5),
    (3, 1, 4, 5),
    (3, 1, 1, 5),
    (3, 2, 4, 5),
    (3, 2, 4, 1),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_and_biases_of_every_rank_broadcast(backend, shape):
    q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64) for n in (4, 5, 5))
    for options in ({"attn_mask": torch.rand(shape) < 0.6}, {"bias": torch.randn(shape, dtype=torch.float64)}):
        expected = attnbook.reference.attention(q, k, v, **options)
        assert_close(attnbook.attention(q, k, v, backend=backend, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=name_of)
def test_the_bias_may_have_another_type(backend, dtype, bias_dtype):
    q, k, v = (torch.randn(1, 2, 3, 4).to(dtype) for _ in range(3))
    bias = torch.randn(2, 3, 3).to(torch.bfloat16).to(bias_dtype)  # a value that each type but float16 holds
    expected = attnbook.reference.attention(*map(array, (q, k, v)), bias=array(bias))
    assert_close(attnbook.attention(q, k, v, bias=bias, backend=backend), expected, times=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_replaces_the_root_of_the_width(backend):
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    found = attnbook.attention(q, k, v, scale=2.0, backend=backend)
    assert_close(found, attnbook.reference.attention(q, k, v, scale=2.0))
    assert torch.allclose(attnbook.attention(q, k, v, scale=0, backend=backend), v.mean(2, keepdim=True))


@pytest.mark.parametrize(
    "normalizer", ["softmax", "softmax_off_by_one", "scalable_softmax", "sparsemax", "entmax15", "sigmoid"]
)
def test_normalizers_by_name_equal_the_reference(normalizer):
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    k, v = k[:, :2], v[:, :2]
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[0, 0, 2] = False
    options = {"attn_mask": mask, "is_causal": True, "normalizer": normalizer, "return_weights": True}
    for ours, expected in zip(
        attnbook.attention(q, k, v, **options), attnbook.reference.attention(q, k, v, **options), strict=True
    ):
        assert_close(ours, expected, times=10)  # a threshold found by another method


def test_a_normalizer_may_be_a_function():
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))

    def uniform(scores, *, mask):
        return mask.to(scores.dtype) / mask.sum(-1, keepdim=True)

    found = attnbook.attention(q, k, v, is_causal=True, normalizer=uniform)
    assert torch.allclose(found, v.cumsum(2) / torch.arange(1, 4)[:, None])


def test_auto_equals_each_backend_and_can_return_weights():
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    auto = attnbook.attention(q, k, v, is_causal=True)
    for backend in BACKENDS:
        assert torch.allclose(auto, attnbook.attention(q, k, v, is_causal=True, backend=backend), atol=1e-6)
    output, weights = attnbook.attention(q, k, v, is_causal=True, return_weights=True)
    assert torch.allclose(output, auto, atol=1e-6)
    assert torch.allclose(weights @ v, output, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_dropout_keeps_the_expectation_and_drops_weights(backend):
    q, k = torch.randn(1, 1, 400, 4), torch.randn(1, 1, 50, 4)
    v = torch.eye(50)[None, None]  # so that the output is the weights
    plain = attnbook.attention(q, k, v, backend=backend)
    dropped = attnbook.attention(q, k, v, dropout_p=0.25, backend=backend)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], (plain / 0.75)[kept], atol=1e-6)
    assert abs(kept.float().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / kept.numel())


def test_returned_weights_are_those_before_dropout():
    q, k, v = (torch.randn(1, 1, 5, 4) for _ in range(3))
    _, weights = attnbook.attention(q, k, v, dropout_p=0.5, return_weights=True)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 1, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_heads_share_keys_in_consecutive_groups(backend):
    q, k, v = torch.randn(1, 6, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3)
    found = attnbook.attention(q, k, v, backend=backend)
    for head in range(6):
        shared = slice(head // 3, head // 3 + 1)
        alone = attnbook.attention(q[:, head : head + 1], k[:, shared], v[:, shared], backend="reference")
        assert torch.allclose(found[:, head : head + 1], alone, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [False, True], ids=["shared mask", "own mask"])
def test_permuting_keys_and_values_together_changes_nothing(backend, cut):
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (5, 9, 9))
    mask = torch.rand(5, 9) < 0.7 if cut else torch.ones(5, 9, dtype=torch.bool)
    order = torch.randperm(9)
    first = attnbook.attention(q, k, v, attn_mask=mask, backend=backend)
    second = attnbook.attention(q, k[:, :, order], v[:, :, order], attn_mask=mask[:, order], backend=backend)
    assert torch.allclose(first, second, rtol=0, atol=1e-14)


def test_repeat_heads_leaves_equal_numbers_alone():
    x = torch.randn(1, 2, 3, 4)
    assert repeat_heads(x, 2) is x
    assert torch.equal(repeat_heads(x, 4)[:, 1], x[:, 0])


def test_naive_attention_is_the_reference_backend():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    output, weights = naive_attention(q, k, v, scale=0.5)
    assert torch.equal(output, attnbook.attention(q, k, v, backend="reference"))
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 3))


def test_the_layer_gives_equal_outputs_whatever_the_backend():
    x = torch.randn(2, 7, 16)
    layer = MultiHeadAttention(16, 4)
    outputs = []
    for layer.backend in BACKENDS:
        outputs.append(layer(x, is_causal=True))
    for output in outputs[1:]:
        assert torch.allclose(output, outputs[0], atol=1e-6)


GOOD = torch.zeros(2, 4, 3, 8)
NAN = GOOD.clone()
NAN[0, 0, 0, 0] = math.nan


def call(query=GOOD, key=GOOD, value=GOOD, **options):
    return attnbook.attention(query, key, value, **options)


BAD = {
    "query: expected a tensor (B, H, L, D), got float32 tensor of shape (4, 3, 8)": {"query": GOOD[0]},
    "query: expected a tensor (B, H, L, D), got ndarray": {"query": GOOD.numpy()},
    "query: expected a tensor (B, H, L, D), got None": {"query": None},
    "query: expected a tensor (B, H, L, D) with no empty axis, got float32 tensor of shape (2, 4, 0, 8)": {
        "query": GOOD[:, :, :0]
    },
    "key: expected a tensor (B, Hkv, S, D) with no empty axis, got float32 tensor of shape (2, 4, 0, 8)": {
        "key": GOOD[:, :, :0]
    },
    "value: expected a tensor (B, Hkv, S, Dv), got float32 tensor of shape (1, 2, 4, 3, 8)": {"value": GOOD[None]},
    "query: expected a float64 or float32 or float16 or bfloat16 tensor, got int64 tensor of shape (2, 4, 3, 8)": {
        "query": GOOD.long()
    },
    "key: expected float32, the type of query, got float64": {"key": GOOD.double()},
    "value: expected float32, the type of query, got float16": {"value": GOOD.half()},
    "key: expected device cpu, that of query, got device meta": {"key": GOOD.to("meta")},
    "key: expected batch size 2, that of query, got float32 tensor of shape (1, 4, 3, 8)": {"key": GOOD[:1]},
    "value: expected batch size 2, that of query, got float32 tensor of shape (1, 4, 3, 8)": {"value": GOOD[:1]},
    "key: expected last axis D = 8, that of query, got shape (2, 4, 3, 7)": {"key": GOOD[..., :7]},
    "value: expected (Hkv, S) = (4, 3), those of key, got shape (2, 2, 3, 8)": {"value": GOOD[:, :2]},
    "value: expected (Hkv, S) = (4, 3), those of key, got shape (2, 4, 2, 8)": {"value": GOOD[:, :, :2]},
    "key: expected a number of heads that divides the 4 of query, got shape (2, 3, 3, 8)": {
        "key": GOOD[:, :3],
        "value": GOOD[:, :3],
    },
    "query: expected no NaN, got 1 NaN of 192 elements": {"query": NAN},
    "key: expected no NaN, got 1 NaN of 192 elements": {"key": NAN},
    "bias: expected no NaN, got 1 NaN of 24 elements": {"bias": NAN[..., :1]},
    "attn_mask: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 3)": {
        "attn_mask": torch.ones(3, 3)
    },
    "attn_mask: expected a bool tensor (True = may attend), got list": {"attn_mask": [[True]]},
    "attn_mask: expected broadcastable to (B, H, L, S) = (2, 4, 3, 3), got bool tensor of shape (2, 3)": {
        "attn_mask": torch.ones(2, 3, dtype=torch.bool)
    },
    "attn_mask: expected broadcastable to (B, H, L, S) = (2, 4, 3, 3), got bool tensor of shape (1, 1, 1, 1, 1)": {
        "attn_mask": torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
    },
    "bias: expected a floating tensor (a mask goes to attn_mask), got bool tensor of shape (3, 3)": {
        "bias": torch.ones(3, 3, dtype=torch.bool)
    },
    "bias: expected a floating tensor (a mask goes to attn_mask), got 0.5": {"bias": 0.5},
    "bias: expected broadcastable to (B, H, L, S) = (2, 4, 3, 3), got float32 tensor of shape (3, 4)": {
        "bias": torch.zeros(3, 4)
    },
    "backend: expected one of 'auto', 'reference', 'sdpa', 'stored', 'tiled', 'flex', 'triton', got 'flash'": {
        "backend": "flash"
    },
    "normalizer: expected one of 'softmax', …, got 'softmin'": {"normalizer": "softmin"},
    "normalizer: expected one of 'softmax', …, got None": {"normalizer": None},
    "dropout_p: expected a number in [0, 1), got 1.0": {"dropout_p": 1.0},
    "dropout_p: expected a number in [0, 1), got -0.1": {"dropout_p": -0.1},
    "dropout_p: expected a number in [0, 1), got nan": {"dropout_p": math.nan},
    "backend: expected 'reference' or 'auto' with return_weights=True, got 'sdpa'": {
        "backend": "sdpa",
        "return_weights": True,
    },
    "backend: expected 'reference' or 'auto' with this normalizer, got 'tiled'": {
        "backend": "tiled",
        "normalizer": "sparsemax",
    },
    "backend: expected 'reference', 'sdpa' or 'auto' with dropout_p > 0, got 'tiled'": {
        "backend": "tiled",
        "dropout_p": 0.1,
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        call(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("L", "S"), [(7, 7), (64, 64), (100, 65), (255, 303)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_nan_is_found_wherever_it_stands(is_causal, L, S, dtype, backend):
    # Part of the backends' own arithmetic: where the output is looked at first, it has to show any NaN.
    given = {"query": torch.randn(1, 2, L, 8), "key": torch.randn(1, 1, S, 8), "value": torch.randn(1, 1, S, 8)}
    given = {name: x.to(dtype) for name, x in given.items()}
    for name, length in (("query", L), ("key", S)):
        for position in (0, length // 2, length - 1):
            spoilt = given[name].clone()
            spoilt[0, -1, position, 3] = math.nan
            with pytest.raises(ValueError, match=f"^{name}: expected no NaN, got 1 NaN"):
                call(**given | {name: spoilt}, is_causal=is_causal, backend=backend)
    spoilt = given["value"].clone()
    spoilt[0, 0, S // 2, 0] = math.nan  # not looked for: it goes where it is attended to
    assert call(**given | {"value": spoilt}, is_causal=is_causal, backend=backend)[..., -1, 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_inputs_are_no_nan(backend):
    bias = torch.tensor([0.0, -math.inf, -math.inf])  # sums to −inf: looked at once, and let pass
    assert attnbook.attention(GOOD, GOOD, GOOD, bias=bias, backend=backend).isfinite().all()


NO_GRADIENT = "backend: expected any but 'flex' where a gradient is wanted on the processor, got 'flex'"
ON_A_GPU = "backend: expected any but 'triton' on the processor, unless TRITON_INTERPRET=1 is set before Python starts"


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", [(63, 100), (100, 63)], ids=name_of)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_keeps_our_conventions(monkeypatch, is_causal, lengths, feature):
    # Uncompiled it computes the same by plain operations; compiling takes seconds for every kind of call.
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(backends, "compiled_flex", lambda: flex_attention)
    inputs, options, _, output, _, weights = case(torch.float32, (4, 2), lengths, feature, is_causal)
    ours = attnbook.attention(*inputs, backend="flex", **options)
    assert_close(ours, output)
    assert (array(ours)[~(weights.sum(-1) > 0)] == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_flex_compiled():
    inputs, options, _, output, _, _ = case(torch.float32, (4, 2), (63, 100), "empty rows", True)
    assert_close(attnbook.attention(*inputs, backend="flex", **options), output)


def test_flex_and_triton_say_what_they_cannot_do(monkeypatch):
    leaf = GOOD.clone().requires_grad_()
    with complains(NO_GRADIENT):
        call(leaf, backend="flex")
    with complains("backend: expected any but 'flex' where float64 is wanted on the processor, got 'flex'"):
        call(GOOD.double(), GOOD.double(), GOOD.double(), backend="flex")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with complains(f"{ON_A_GPU}, got 'triton'"):
        call(backend="triton")


def test_triton_gets_the_whole_call(monkeypatch):
    seen = {}

    def kernel(query, key, value, **options):
        seen.update(options)
        return query

    monkeypatch.setitem(sys.modules, "attnbook.kernels", SimpleNamespace(triton_attention=kernel))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert call(backend="triton", attn_mask=torch.tensor(True), is_causal=True) is GOOD
    assert seen.pop("attn_mask").shape == (1, 1, 1, 1)
    assert seen == {"bias": None, "is_causal": True, "scale": 8**-0.5}


def chosen(monkeypatch, *tensors, **options) -> str:
    """Return which backend "auto" takes."""
    taken = []
    for name in backends.COMPUTE:
        monkeypatch.setitem(backends.COMPUTE, name, lambda call, name=name: taken.append(name) or call.query)
    attnbook.attention(*(tensors or (GOOD, GOOD, GOOD)), **options)
    return taken[0] if taken else "reference"


TABLE = {
    "AVX2": {
        "rows": [
            {"dtype": "float32", "gradient": True, "mask": "causal", "L": 64, "S": 64, "take": "tiled"},
            {"dtype": "float32", "gradient": True, "mask": "causal", "L": 1024, "S": 1024, "take": "stored"},
            {"dtype": "float32", "gradient": False, "mask": "tensor", "L": 64, "S": 64, "take": "reference"},
            {"dtype": "bfloat16", "gradient": False, "mask": "none", "L": 64, "S": 64, "take": "stored"},
        ]
    }
}


@pytest.fixture
def own_table(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    monkeypatch.setattr(choice, "TABLE", path)
    for cached in (choice._rows, choice.nearest, choice._take):
        cached.cache_clear()
    yield
    for cached in (choice._rows, choice.nearest, choice._take):
        cached.cache_clear()


@pytest.mark.usefixtures("own_table")
def test_auto_takes_what_the_table_says_at_the_nearest_lengths(monkeypatch):
    def leaf(n, heads=1):
        return torch.zeros(1, heads, n, 4, requires_grad=True)

    assert chosen(monkeypatch, leaf(70), leaf(70), leaf(70), is_causal=True) == "tiled"
    assert chosen(monkeypatch, leaf(500), leaf(500), leaf(500), is_causal=True) == "stored"
    assert chosen(monkeypatch, *[leaf(1024, 80)] * 3, is_causal=True) == "sdpa"  # 320 MiB of weights
    with torch.no_grad():
        assert chosen(monkeypatch, leaf(70), leaf(70), leaf(70), is_causal=True) == "sdpa"  # no such row
    assert chosen(monkeypatch, attn_mask=torch.tensor(True)) == "reference"
    assert chosen(monkeypatch, bias=torch.tensor(0.0), is_causal=True) == "reference"
    assert chosen(monkeypatch, *[GOOD.half()] * 3) == "stored"
    assert chosen(monkeypatch, *[GOOD.half()] * 3, dropout_p=0.1) == "sdpa"
    assert chosen(monkeypatch, *[GOOD.to("meta")] * 3, attn_mask=torch.ones(1, device="meta") > 0) == "sdpa"


def test_the_table_has_every_setting_of_its_grid():
    found = choice.table()
    assert choice.DEFAULT in found
    for part in found.values():
        assert {"commit", "device", "threads", "versions"} <= set(part["provenance"])
        rows = [{key: row[key] for key in ("dtype", "gradient", "mask", "L", "S")} for row in part["rows"]]
        assert rows == list(choose.settings())
        for row in part["rows"]:
            times = row["ms"].values()  # by the number of threads
            worst = {name: max(each[name] / min(each.values()) for each in times) for name in row["ms"]["1"]}
            assert worst[row["take"]] <= 1.05 * min(worst.values())


def test_cudnn_comes_first_in_half_precision_from_hopper_on():
    assert backends.kernel_order((9, 0), torch.bfloat16)[0] == "CUDNN_ATTENTION"
    assert backends.kernel_order((10, 0), torch.float16)[0] == "CUDNN_ATTENTION"
    assert backends.kernel_order((8, 0), torch.bfloat16) is None
    assert backends.kernel_order((9, 0), torch.float32) is None


@pytest.mark.parametrize("fast", [False, True])
def test_sdpa_is_widened_for_a_gradient_where_half_precision_is_slow(monkeypatch, fast):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def fused(query, *rest, **options):
        seen.append(query.dtype)
        return original(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(backends, "multiplies_fast", lambda dtype: fast or dtype == torch.float32)
    leaf = GOOD.to(torch.bfloat16).requires_grad_()
    assert call(leaf, leaf, leaf, backend="sdpa").dtype == torch.bfloat16
    with torch.no_grad():
        call(leaf, leaf, leaf, backend="sdpa")
    assert seen == [torch.bfloat16 if fast else torch.float32, torch.bfloat16]
