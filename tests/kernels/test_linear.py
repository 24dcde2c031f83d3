"""The Triton kernels of chunked linear attention: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import array, assert_close, complains, name_of

pytest.importorskip("triton")
from attnbook.kernels import triton_linear_attention
from attnbook.kernels.common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def draw(heads: int, L: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(1, heads, L, D).to(DEVICE, dtype).requires_grad_()


def formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, grad: np.ndarray, normalize: bool) -> list[np.ndarray]:
    """o_i = Σ_{j≤i} (q_i·k_j) v_j, normalised or not, and the gradients of ⟨o, grad⟩, position by position."""
    output, dq, dk, dv = np.zeros_like(grad), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    groups = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(q.shape[:3]):
        seen = (b, h // groups, slice(0, i + 1))
        weights = k[seen] @ q[b, h, i]  # (i + 1,)
        total = weights.sum() if normalize else 1.0
        output[b, h, i] = weights @ v[seen] / total
        g = grad[b, h, i]
        dweights = v[seen] @ g - (output[b, h, i] @ g if normalize else 0)
        dq[b, h, i] = dweights @ k[seen] / total
        dk[seen] += np.outer(dweights, q[b, h, i]) / total
        dv[seen] += np.outer(weights, g) / total
    return [output, dq, dk, dv]


def check(q: Tensor, k: Tensor, v: Tensor, *, normalize: bool, chunk_size: int = 16) -> None:
    grad = torch.randn(*q.shape[:3], v.shape[3]).to(DEVICE, q.dtype)
    output = triton_linear_attention(q, k, v, normalize=normalize, chunk_size=chunk_size)
    assert output.dtype == q.dtype
    found = [output, *torch.autograd.grad(output, (q, k, v), grad)]
    expected = formula(*(array(x.cpu()) for x in (q, k, v, grad)), normalize)
    for name, x, wanted in zip(("output", "q", "k", "v"), found, expected, strict=True):
        assert_close(x.cpu(), wanted, gradient=name != "output", name=name)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("length", "dtype"), [(1, DTYPES[0]), (32, DTYPES[0]), *((40, dtype) for dtype in DTYPES)], ids=name_of
)
def test_the_kernels_compute_the_formula(length, dtype, normalize):
    check(draw(2, length, 8, dtype), draw(1, length, 8, dtype), draw(1, length, 6, dtype), normalize=normalize)


def test_features_and_values_wider_than_a_tile():
    check(draw(1, 20, 70), draw(1, 20, 70), draw(1, 20, 66), normalize=True)


def test_the_size_of_a_chunk_changes_nothing():
    q, k, v = draw(2, 33, 8), draw(1, 33, 8), draw(1, 33, 6)
    one = triton_linear_attention(q, k, v, chunk_size=64)
    for chunk_size in (16, 32):
        assert_close(triton_linear_attention(q, k, v, chunk_size=chunk_size).cpu(), one.cpu())


def test_views_are_read_where_they_lie():
    q, k = draw(40, 2, 8).transpose(1, 2), draw(40, 1, 8).transpose(1, 2)
    v = draw(1, 6, 40).transpose(2, 3)
    before = [x.detach().clone() for x in (q, k, v)]
    check(q, k, v, normalize=False)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_no_output_depends_on_what_comes_later():
    q, k, v = draw(1, 40, 8), draw(1, 40, 8), draw(1, 40, 6)
    output = triton_linear_attention(q, k, v, chunk_size=16)
    for i in (0, 15, 16):
        for gradient in torch.autograd.grad(output[:, :, i].sum(), (q, k, v), retain_graph=True):
            assert (gradient[:, :, i + 1 :] == 0).all()


def test_where_all_weights_are_zero_so_is_the_output():
    q, k, v = draw(1, 20, 8), draw(1, 20, 8), draw(1, 20, 6)
    with torch.no_grad():
        k[:, :, :5] = 0
        q[:, :, 10] = 0
    output = triton_linear_attention(q, k, v, chunk_size=16)
    assert (output[:, :, :5] == 0).all()
    assert (output[:, :, 10] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), (q, k, v)))


def test_sums_do_not_overflow_float16():
    q, k = (torch.full((1, 1, 64, 16), 40.0, device=DEVICE, dtype=torch.float16) for _ in range(2))
    v = torch.ones(1, 1, 64, 6, device=DEVICE, dtype=torch.float16)
    # One weight is 16 · 40² = 25,600; three of them are more than float16 holds.
    assert (triton_linear_attention(q, k, v, chunk_size=16) == 1).all()


GOOD = torch.ones(1, 2, 3, 4, device=DEVICE)
BAD = {
    "query: expected a float32 or float16 or bfloat16 tensor, got float64 tensor of shape (1, 2, 3, 4)": {
        "query": GOOD.double()
    },
    "key: expected as many positions as query has, S = L = 3, got shape (1, 2, 2, 4)": {
        "key": GOOD[:, :, :2],
        "value": GOOD[:, :, :2],
    },
    "chunk_size: expected an integer ≥ 16, got 8": {"chunk_size": 8},
    "chunk_size: expected a power of two, got 48": {"chunk_size": 48},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        triton_linear_attention(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = draw(1, 3, 4), draw(1, 3, 4), draw(1, 3, 4)
    (gradient,) = torch.autograd.grad(triton_linear_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
