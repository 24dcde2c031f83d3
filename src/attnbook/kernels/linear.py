"""Causal linear attention as Triton kernels, chunk by chunk.

Two kernels do everything. ``_states`` sums up x yᵀ over each chunk; the cumulative sum of these gives each chunk a
state H, the sum over all positions before it (or behind it). ``_outputs`` joins what lies inside a chunk with what lies
outside: mask(X Yᵀ) Z + X H. With G the gradient of the output, the forward pass and its three gradients are then one
formula over different operands:

======  ===================  ======  ======  ======  =================================
result  sum                  x       y       z       state: sum of
======  ===================  ======  ======  ======  =================================
O       Σ j≤i (qᵢ·kⱼ) vⱼ     q       k       v       k vᵀ, chunks before
dQ      Σ j≤i (gᵢ·vⱼ) kⱼ     g       v       k       v kᵀ, chunks before: its transpose
dK      Σ i≥j (vⱼ·gᵢ) qᵢ     v       g       q       g qᵀ, chunks behind
dV      Σ i≥j (kⱼ·qᵢ) gᵢ     k       q       g       q gᵀ, chunks behind: its transpose
======  ===================  ======  ======  ======  =================================
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.kernels.common import check_operand, on_device_of, padded, precision, tl, triton, unit_stride
from attnbook.mechanisms.common import check_call
from attnbook.shapes import check_count, describe, mismatch

WIDEST = 64  # columns of a tile; wider heads take several


@triton.jit
def _load(x, strides, b, h, rows, height, columns, width):
    """Load rows and columns of x[b, h] → (rows, columns); zeros beyond (height, width)."""
    x += b * strides[0] + h * strides[1] + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :]
    return tl.load(x, mask=(rows[:, None] < height) & (columns[None, :] < width), other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Multiply two tiles into float32; a sum in float32 is never made narrower, it may be too large for float16."""
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _states(
    x, y, states, x_strides, y_strides, H, G, L, chunks, M, N,
    CHUNK: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum up x yᵀ over one chunk and the G heads of a group; a program computes MP × NP of the state.

    x is (B, H, L, M), y (B, H, L, N), states (B, H / G, chunks, M, N) float32. Each sum is stored one place later than
    its chunk's own (in the order of the cumulative sum), and zeros come first: a chunk's state leaves out itself.
    """
    c, group = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    b, first_h = group // (H // G), group % (H // G) * G
    rows = c * CHUNK + tl.arange(0, CHUNK)
    m, n = tl.program_id(1) * MP + tl.arange(0, MP), tl.program_id(2) * NP + tl.arange(0, NP)
    state = tl.zeros([MP, NP], tl.float32)
    for g in range(G):
        x_tile = _load(x, x_strides, b, first_h + g, rows, L, m, M)  # (CHUNK, MP)
        y_tile = _load(y, y_strides, b, first_h + g, rows, L, n, N)  # (CHUNK, NP)
        state += _dot(x_tile.T, y_tile, PRECISION)  # (MP, CHUNK) @ (CHUNK, NP)
    place = ((chunks - 1 - c if BEHIND else c) + 1) % chunks
    state = tl.where(place == 0, 0.0, state)
    states += ((group * chunks + place) * M + m[:, None]) * N + n[None, :]
    tl.store(states, state, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _outputs(
    x, y, z, states, out, x_strides, y_strides, z_strides, state_strides, H, SHARE, SUM, L, chunks, M, N,
    CHUNK: tl.constexpr, MP: tl.constexpr, NP: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute mask(X Yᵀ) Z + X H for one chunk and NP columns.

    x is (B, H, L, M), y and z have M and N columns, out is (B, H, L, N). SHARE heads of x use one head of y and z (as
    queries do); or a head of x meets SUM heads of y and z, and the results add up (as for the gradient of keys).
    """
    c, head = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // H, head % H
    rows = c * CHUNK + tl.arange(0, CHUNK)
    n = tl.program_id(1) * NP + tl.arange(0, NP)
    place = chunks - 1 - c if BEHIND else c
    states += (head // SHARE * chunks + place) * M * N
    out_tile = tl.zeros([CHUNK, NP], tl.float32)

    for first in range(0, M, MP):  # what lies outside the chunk
        m = first + tl.arange(0, MP)
        x_tile = _load(x, x_strides, b, h, rows, L, m, M)  # (CHUNK, MP)
        inside = (m[:, None] < M) & (n[None, :] < N)
        state = tl.load(states + m[:, None] * state_strides[0] + n[None, :] * state_strides[1], mask=inside, other=0.0)
        out_tile += _dot(x_tile, state, PRECISION)  # (CHUNK, MP) @ (MP, NP)

    for g in range(SUM):  # what lies inside
        other = h // SHARE * SUM + g
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first in range(0, M, MP):
            m = first + tl.arange(0, MP)
            x_tile = _load(x, x_strides, b, h, rows, L, m, M)  # (CHUNK, MP)
            y_tile = _load(y, y_strides, b, other, rows, L, m, M)  # (CHUNK, MP)
            scores += _dot(x_tile, y_tile.T, PRECISION)  # (CHUNK, MP) @ (MP, CHUNK)
        seen = rows[:, None] <= rows[None, :] if BEHIND else rows[:, None] >= rows[None, :]
        z_tile = _load(z, z_strides, b, other, rows, L, n, N)  # (CHUNK, NP)
        out_tile += _dot(tl.where(seen, scores, 0.0), z_tile, PRECISION)  # (CHUNK, CHUNK) @ (CHUNK, NP)

    out += (head * L + rows[:, None]) * N + n[None, :]
    tl.store(out, out_tile.to(out.dtype.element_ty), mask=(rows[:, None] < L) & (n[None, :] < N))


def _tile(size: int) -> int:
    return min(WIDEST, padded(size))


def _sum_states(x: Tensor, y: Tensor, groups: int, chunk: int, behind: bool, exact: str) -> Tensor:
    """Return the state of each chunk: the sum of x yᵀ over the positions before it, or behind it in reverse order.

    x is (B, H, L, M), y (B, H, L, N); the result (B, groups, chunks, M, N) float32.
    """
    (B, H, L, M), N = x.shape, y.shape[-1]
    chunks = triton.cdiv(L, chunk)
    states = torch.empty(B, groups, chunks, M, N, dtype=torch.float32, device=x.device)
    grid = (chunks * B * groups, triton.cdiv(M, _tile(M)), triton.cdiv(N, _tile(N)))
    _states[grid](
        x, y, states, x.stride()[:3], y.stride()[:3], H, H // groups, L, chunks, M, N, chunk, _tile(M), _tile(N),
        behind, exact,
    )  # fmt: skip
    return states.cumsum_(2)


def _join(x: Tensor, y: Tensor, z: Tensor, states: Tensor, chunk: int, behind: bool, exact: str) -> Tensor:
    """Return mask(X Yᵀ) Z + X H.

    x is (B, H, L, M), y (B, Hy, L, M), z (B, Hy, L, N), states (B, Hkv, chunks, M, N), the two last axes in any
    order of memory; the result (B, H, L, N) float32.
    """
    (B, H, L, M), N = x.shape, z.shape[-1]
    groups, chunks = states.shape[1:3]
    out = torch.empty(B, H, L, N, dtype=torch.float32, device=x.device)
    _outputs[(chunks * B * H, triton.cdiv(N, _tile(N)))](
        x, y, z, states, out, x.stride()[:3], y.stride()[:3], z.stride()[:3], states.stride()[3:], H, H // groups,
        y.shape[1] // groups, L, chunks, M, N, chunk, _tile(M), _tile(N), behind, exact,
    )  # fmt: skip
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, normalize, chunk):
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        groups, exact = key.shape[1], precision(query)
        # The sum of the weights is the output for values of one.
        columns = (value, torch.ones_like(value[..., :1])) if normalize else (value,)
        with on_device_of(query):
            states = [_sum_states(key, v, groups, chunk, False, exact) for v in columns]
            sums = [_join(query, key, v, state, chunk, False, exact) for v, state in zip(columns, states, strict=True)]
        output, total = sums[0], None
        if normalize:
            total = sums[1].masked_fill_(sums[1] == 0, torch.inf)  # (B, H, L, 1); nothing to divide by gives zero
            output = output / total
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, output, total, *columns, *states)
        ctx.chunk = chunk
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, output, total, *rest = ctx.saved_tensors
        columns, before = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        groups, exact, chunk = key.shape[1], precision(query), ctx.chunk
        if total is None:
            grads = [unit_stride(grad_output)]
        else:  # of the sums n and t in o = n / t: g / t and −⟨g, o⟩ / t
            grad = grad_output / total
            grads = [unit_stride(grad), -(grad * output).sum(-1, keepdim=True)]
        dq, dk = torch.zeros_like(query, dtype=torch.float32), torch.zeros_like(key, dtype=torch.float32)
        with on_device_of(query):
            for v, grad, state in zip(columns, grads, before, strict=True):
                behind = _sum_states(query, grad, groups, chunk, True, exact)
                dq += _join(grad, v, key, state.mT, chunk, False, exact)
                dk += _join(v, grad, query, behind.mT, chunk, True, exact)
                if v is columns[0]:
                    dv = _join(key, query, grad, behind, chunk, True, exact)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(columns[0].dtype), None, None


def triton_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, normalize: bool = True, chunk_size: int = 64
) -> Tensor:
    """Compute causal linear attention over given features with Triton kernels on a GPU.

    Computes oᵢ = Σ j≤i (qᵢ·kⱼ) vⱼ, normalised: divided by Σ j≤i qᵢ·kⱼ ({cite}`katharopoulos2020`, §3.3).
    Differs from the paper: it computes chunk by chunk instead of position by position; the feature map is the caller's.

    Args:
        query: (B, H, L, M) float32, float16 or bfloat16: the queries' features.
        key: (B, Hkv, L, M): the keys' features.
        value: (B, Hkv, L, Dv).
        normalize: divide by the sum of the weights; where that is zero, the output is.
        chunk_size: a power of two, at least 16.
    Returns:
        (B, H, L, Dv), dtype of query; summed up in float32. Differentiable once.
    Raises:
        ValueError: shapes or types that do not fit; key of another length than query; tensors not on a GPU, unless
            Triton's interpreter runs; a chunk size that is no power of two.
    Cost: O(L·(chunk_size·(M + Dv) + M·Dv)) time, O(L·M·Dv / chunk_size) memory, kept for the backward pass.
    """
    for name, x, axes in (("query", query, "B H L M"), ("key", key, "B Hkv L M"), ("value", value, "B Hkv L Dv")):
        check_operand(name, x, axes)
    check_call(query, key, value, equal_lengths=True)
    if check_count("chunk_size", chunk_size, least=16) & (chunk_size - 1):
        raise mismatch("chunk_size", "a power of two", describe(chunk_size))
    return _Linear.apply(query, key, value, normalize, chunk_size)
