"""Sparse patterns beside compiled FlexAttention, and beside dense attention with the pattern as a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnbook import masks
from attnbook.bench.case import Comparison
from attnbook.mechanisms import document_attention, sliding_window_attention

WINDOW, DOCUMENTS, LENGTH = 256, 8, 2048


def _flex(query: Tensor, key: Tensor, value: Tensor, rule: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Compile FlexAttention for a rule (b, h, q, k) → may attend; on the CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(rule, None, None, query.shape[2], key.shape[2], device=query.device.type)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, block_mask=block_mask)


def _draw(dtype: torch.dtype, wanted: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 8, LENGTH, 64, generator=generator).to(dtype) for _ in range(3)]
    return [x.requires_grad_(wanted) for x in drawn]


def _forward_and_backward(function: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function().sum(), inputs)


def suite() -> Iterator[Comparison]:
    """Yield the comparisons of this suite.

    Yields:
        Forward against FlexAttention, ours with gradients wanted; forward and backward against dense attention, since
        FlexAttention has no backward pass on the CPU.
    """
    band = masks.sliding_window(LENGTH, window=WINDOW)
    ids = torch.arange(LENGTH) // (LENGTH // DOCUMENTS)
    together = masks.document(ids[None])
    for dtype, goal in ((torch.float32, 1.0), (torch.bfloat16, 1.3)):
        setting = f"(1, 8, {LENGTH}, 64), window {WINDOW}, causal, {str(dtype)[6:]}"
        plain, inputs = _draw(dtype, False), _draw(dtype, True)

        def ours(inputs: list[Tensor] = inputs) -> Tensor:
            return sliding_window_attention(*inputs, window=WINDOW, is_causal=True)

        def dense(inputs: list[Tensor] = inputs) -> Tensor:
            return scaled_dot_product_attention(*inputs, attn_mask=band)

        flex = _flex(*plain, lambda b, h, i, j: (i >= j) & (i - j < WINDOW))
        yield Comparison("sparse", "sliding window, forward", setting, ours, {"FlexAttention, compiled": flex}, goal)
        both = {"SDPA with a mask": _forward_and_backward(dense, inputs)}
        mine = _forward_and_backward(ours, inputs)
        yield Comparison("sparse", "sliding window, forward and backward", setting, mine, both, None)

    setting = f"(1, 8, {LENGTH}, 64), {DOCUMENTS} documents, float32"
    plain, inputs = _draw(torch.float32, False), _draw(torch.float32, True)

    def packed() -> Tensor:
        return document_attention(*inputs, ids=ids)

    def masked() -> Tensor:
        return scaled_dot_product_attention(*inputs, attn_mask=together)

    flex = _flex(*plain, lambda b, h, i, j: ids[i] == ids[j])
    yield Comparison("sparse", "documents, forward", setting, packed, {"FlexAttention, compiled": flex}, 0.7)
    yield Comparison("sparse", "documents, forward", setting, packed, {"SDPA with a mask": masked}, 0.2)
    mine = _forward_and_backward(packed, inputs)
    both = {"SDPA with a mask": _forward_and_backward(masked, inputs)}
    yield Comparison("sparse", "documents, forward and backward", setting, mine, both, None)
