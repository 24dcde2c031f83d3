"""Dense attention: what ``attention`` chooses, and the tiled form, beside PyTorch's fused kernel and the naive form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnbook.bench.case import Comparison, MemoryComparison, Program
from attnbook.functional import attention
from attnbook.mechanisms import tiled_attention

Attend = Callable[..., Tensor]
MOST_NAIVE = 1024  # above it the naive forms take three times as long as the fused kernel, and gigabytes


def naive(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Compute attention by two ``einsum`` and a softmax, in the type of the operands.

    Args:
        query: (B, H, L, D).
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        is_causal: mask what lies above the diagonal.
    """
    scores = torch.einsum("bhld,bhsd->bhls", query, key) * query.shape[-1] ** -0.5
    if is_causal:
        triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~triangle, -math.inf)
    return torch.einsum("bhls,bhsd->bhld", torch.softmax(scores, -1), value)


FORMS: dict[str, Attend] = {
    "auto": attention,
    "tiled": tiled_attention,
    "SDPA": torch.nn.functional.scaled_dot_product_attention,
    "naive": naive,
}


def work(
    form: str | Attend,
    *,
    length: int,
    dtype: str = "float32",
    is_causal: bool = True,
    backward: bool = True,
    batch_size: int = 1,
    heads: int = 8,
) -> Callable[[], Any]:
    """Make inputs (batch_size, heads, length, 64), and return a function that attends.

    Args:
        form: a name in ``FORMS``, or a function.
        length: L and S.
        dtype: of the inputs.
        is_causal: whether it is causal.
        backward: whether gradients are computed too.
        batch_size: B.
        heads: H.
    """
    attend = FORMS[form] if isinstance(form, str) else form
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, heads, length, 64)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(4))
    if not backward:
        return torch.no_grad()(lambda: attend(q, k, v, is_causal=is_causal))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*inputs, is_causal=is_causal), inputs, grad)


def _compiled_naive() -> Attend:
    torch._dynamo.reset()  # each shape and type is compiled for itself
    return torch.compile(naive, dynamic=False)


def suite() -> Iterator[Comparison | MemoryComparison]:
    """Yield the comparisons."""
    for length in (256, 512, 1024, 2048, 4096, 8192):
        for dtype in ("float32", "bfloat16"):
            for is_causal in (False, True):
                for backward in (False, True):
                    given = {"length": length, "dtype": dtype, "is_causal": is_causal, "backward": backward}
                    peers = {"SDPA": work("SDPA", **given)}
                    if length <= MOST_NAIVE:
                        peers["naive"] = work("naive", **given)
                        peers["naive, compiled"] = work(_compiled_naive(), **given)
                    setting = f"(1, 8, {length}, 64), {dtype}{', causal' if is_causal else ''}"
                    what = f"attention, {'forward and backward' if backward else 'forward'}"
                    yield Comparison("dense", what, setting, work("auto", **given), peers, 1.05)
    given = {"length": 256, "dtype": "bfloat16", "batch_size": 16, "heads": 6}
    peers = {"SDPA": work("SDPA", **given)}
    what = "attention, forward and backward"
    yield Comparison("dense", what, "(16, 6, 256, 64), bfloat16, causal", work("auto", **given), peers, 0.45)
    what = "tiled attention, forward and backward"
    for length in (2048, 8192):
        peers = {"SDPA": work("SDPA", length=length)}
        setting = f"(1, 8, {length}, 64), float32, causal"
        yield Comparison("dense", what, setting, work("tiled", length=length), peers, 1.4)
    setting = "(1, 8, 8192, 64), float32, causal"
    for peer, goal in (("SDPA", 1.5), ("naive", 1 / 40)):
        ours, theirs = (Program("attnbook.bench.dense:work", 8192, {"form": form}) for form in ("tiled", peer))
        yield MemoryComparison("dense", f"{what}: peak memory", setting, ours, {peer: theirs}, goal)
