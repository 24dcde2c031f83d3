"""Kernels on a GPU: ours in Triton beside PyTorch's fused attention and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnbook.bench.case import Comparison, Timing
from attnbook.measure import attention_flops
from attnbook.shapes import mismatch

Attend = Callable[..., Tensor]


def _naive(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
    """Build the matrix in the type of the operands, as a model in half precision would."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, H, L, S)
    if is_causal:
        scores = scores + torch.full_like(scores[0, 0], -torch.inf).triu(1 + scores.shape[-1] - scores.shape[-2])
    return torch.softmax(scores, -1) @ value


def _fused(backend: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return attend


@cache
def _compiled_flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _causal_blocks(length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def _flex(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
    block_mask = _causal_blocks(query.shape[2], query.device.type) if is_causal else None
    return _compiled_flex()(query, key, value, block_mask=block_mask)


def _triton(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
    from attnbook.kernels import triton_attention

    return triton_attention(query, key, value, is_causal=is_causal)


OURS = "attnbook, Triton"
KERNELS: dict[str, Attend] = {
    "naive": _naive,
    "SDPA, FlashAttention": _fused("FLASH_ATTENTION"),
    "SDPA, memory-efficient": _fused("EFFICIENT_ATTENTION"),
    "SDPA, cuDNN": _fused("CUDNN_ATTENTION"),
    "FlexAttention, compiled": _flex,
    OURS: _triton,
}


def teraflops(
    seconds: float,
    *,
    length: int,
    head_dim: int,
    heads: int,
    batch_size: int = 1,
    is_causal: bool = False,
    backward: bool = False,
) -> float:
    """Turn a time into TFLOP/s by the papers' formula: forward 4·L²·D a head, forward and backward 3.5 times that.

    The formula is the same for every kernel, however much it really computes; causal attention counts half
    ({cite}`dao2024`, section 4.1).

    Args:
        seconds: of one call.
        length: L = S.
        head_dim: D.
        heads: H.
        batch_size: B.
        is_causal: count half of the pairs.
        backward: the call was forward and backward.
    Raises:
        ValueError: a time that is not positive.
    """
    if not seconds > 0:
        raise mismatch("seconds", "a number > 0", seconds)
    flops = attention_flops(length, length, head_dim, heads=heads, batch_size=batch_size)
    return flops * (3.5 if backward else 1) / (2 if is_causal else 1) / seconds / 1e12


def rates(timing: Timing, **settings: Any) -> dict[str, float]:
    """Return everyone's rate in a comparison of dense attention.

    Args:
        timing: what was measured.
        settings: those of :func:`teraflops`.
    Returns:
        TFLOP/s by name; ours under "attnbook".
    """
    return {name: teraflops(seconds, **settings) for name, seconds in timing.seconds.items()}


def _waiting(function: Callable[[], Any]) -> Callable[[], None]:
    """Make a call that returns when the GPU is done."""

    def call() -> None:
        function()
        torch.cuda.synchronize()

    return call


def _forward_backward(attend: Attend, inputs: list[Tensor], grad: Tensor, **options: Any) -> Callable[[], None]:
    return _waiting(lambda: torch.autograd.grad(attend(*inputs, **options), inputs, grad))


def _runs(function: Callable[[], Any]) -> bool:
    """Tell whether a peer can do it here; SDPA's kernels refuse where they are not built or the GPU is too old."""
    try:
        function()
    except RuntimeError:
        return False
    return True


def suite(*, batch_size: int = 2, heads: int = 16, length: int = 8192, head_dim: int = 128) -> Iterator[Comparison]:
    """Yield dense causal attention, forward, then forward and backward, and chunked linear attention.

    Times are the wall's, with the GPU waited for. Nothing is yielded where PyTorch sees no CUDA device.

    Args:
        batch_size: B.
        heads: H.
        length: L = S of dense attention; linear attention takes twice that.
        head_dim: D, of dense attention; linear attention takes half that.
    Yields:
        Ours in bfloat16 beside each peer that runs here; "goal" is relative to the best of them.
    """
    if not torch.cuda.is_available():
        print("no CUDA device here")
        return
    yield from _dense(batch_size, heads, length, head_dim)
    yield from _linear(batch_size, heads, 2 * length, head_dim // 2)


def _draw(*shape: int, wanted: bool) -> tuple[list[Tensor], Tensor]:
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return [x.requires_grad_(wanted) for x in (q, k, v)], grad


def _dense(batch_size: int, heads: int, length: int, head_dim: int) -> Iterator[Comparison]:
    setting = f"({batch_size}, {heads}, {length}, {head_dim}), causal, bfloat16"
    for backward in (False, True):
        inputs, grad = _draw(batch_size, heads, length, head_dim, wanted=backward)

        def call(name: str, inputs: list[Tensor] = inputs, grad: Tensor = grad, backward: bool = backward):
            if backward:
                return _forward_backward(KERNELS[name], inputs, grad, is_causal=True)
            return _waiting(lambda: KERNELS[name](*inputs, is_causal=True))

        calls = {name: call(name) for name in KERNELS if name not in ("naive", OURS)}
        peers = {name: peer for name, peer in calls.items() if _runs(peer)}
        what = "dense attention, forward and backward" if backward else "dense attention, forward"
        yield Comparison("gpu", what, setting, call(OURS), peers, 1 / 0.6, wall=True)


def _linear(batch_size: int, heads: int, length: int, head_dim: int) -> Iterator[Comparison]:
    from attnbook.kernels import triton_linear_attention

    inputs, grad = _draw(batch_size, heads, length, head_dim, wanted=True)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return triton_linear_attention(query.relu(), key.relu(), value)

    names = ("SDPA, FlashAttention", "SDPA, memory-efficient", "SDPA, cuDNN")
    calls = {name: _forward_backward(KERNELS[name], inputs, grad, is_causal=True) for name in names}
    peers = {name: peer for name, peer in calls.items() if _runs(peer)}
    setting = f"({batch_size}, {heads}, {length}, {head_dim}), causal, bfloat16"
    mine = _forward_backward(ours, inputs, grad)
    yield Comparison("gpu", "chunked linear attention, forward and backward", setting, mine, peers, 0.25, wall=True)
