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


def _linear(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Attend linearly, with rectified queries and keys as features; always causal."""
    from attnbook.kernels import triton_linear_attention

    return triton_linear_attention(query.relu(), key.relu(), value)


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


def _waiting(function: Callable[[], Any], device: str) -> Callable[[], None]:
    """Make a call that returns when the GPU is done."""

    def call() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _runs(function: Callable[[], Any]) -> bool:
    """Tell whether a peer can do it here; SDPA's kernels refuse where they are not built or the GPU is too old."""
    try:
        function()
    except RuntimeError:
        return False
    return True


def suite(
    *,
    batch_size: int = 2,
    heads: int = 16,
    length: int = 8192,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> Iterator[Comparison]:
    """Yield dense causal attention, forward, then forward and backward, and chunked linear attention.

    Times are the wall's, with the GPU waited for. Where PyTorch sees no CUDA device, it says so and yields nothing.

    Args:
        batch_size: B.
        heads: H.
        length: L = S of dense attention; linear attention takes twice that.
        head_dim: D of dense attention; linear attention takes half that.
        dtype: of queries, keys and values.
        device: "cuda", or "cpu" to try the code in Triton's interpreter.
    Yields:
        Ours beside each peer that runs here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here")
        return

    def compare(
        what: str, length: int, head_dim: int, backward: bool, ours: Attend, names: tuple[str, ...], goal: float
    ) -> Comparison:
        shape = batch_size, heads, length, head_dim
        query, key, value, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
        inputs = [x.requires_grad_(backward) for x in (query, key, value)]

        def call(attend: Attend) -> Callable[[], None]:
            if backward:
                return _waiting(lambda: torch.autograd.grad(attend(*inputs, is_causal=True), inputs, grad), device)
            return _waiting(lambda: attend(*inputs, is_causal=True), device)

        peers = {name: peer for name in names if _runs(peer := call(KERNELS[name]))}
        what = f"{what}, forward and backward" if backward else f"{what}, forward"
        setting = f"{shape}, causal, {str(dtype)[6:]}"
        return Comparison("gpu", what, setting, call(ours), peers, goal, wall=True)

    fused = tuple(name for name in KERNELS if name.startswith("SDPA"))
    for backward in (False, True):  # the goal is 0.6 of the best peer's rate
        names = (*fused, "FlexAttention, compiled")
        yield compare("dense attention", length, head_dim, backward, KERNELS[OURS], names, 1 / 0.6)
    yield compare("chunked linear attention", 2 * length, head_dim // 2, True, _linear, fused, 0.25)
