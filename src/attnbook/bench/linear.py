"""Linear attention beside softmax attention, and the chunked causal form beside the one that keeps every state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnbook.bench.case import Comparison
from attnbook.mechanisms import linear_attention

LENGTH = 2048


def running_sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal linear attention from the running sums of φ(k) vᵀ at every position, (B, H, L, D, Dv) of them.

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D).
        value: (B, H, L, Dv).
    Returns:
        (B, H, L, Dv).
    """
    q, k = torch.nn.functional.elu(query) + 1, torch.nn.functional.elu(key) + 1
    states = torch.einsum("bhlf,bhlv->bhlfv", k, value).cumsum(2)
    return torch.einsum("bhlf,bhlfv->bhlv", q, states) / (q * k.cumsum(2)).sum(-1, keepdim=True)


def suite() -> Iterator[Comparison]:
    """Yield the comparisons of causal linear attention, chunked."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 8, LENGTH, 64, generator=generator) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    setting = f"(1, 8, {LENGTH}, 64) float32, causal"

    def forward(function: Callable[..., Tensor], **options: Any) -> Callable[[], Any]:
        return torch.no_grad()(lambda: function(q, k, v, **options))

    def both(function: Callable[..., Tensor], **options: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(q, k, v, **options), (q, k, v), grad)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    for what, call, goals in (("forward", forward, (0.45, 1 / 40)), ("forward and backward", both, (0.25, 1 / 40))):
        ours = call(linear_attention, is_causal=True)
        peers = ({"SDPA": call(sdpa, is_causal=True)}, {"running sums": call(running_sums)})
        for peer, goal in zip(peers, goals, strict=True):
            yield Comparison("linear", f"linear attention, {what}", setting, ours, peer, goal)
