"""Attention by a matrix-valued state, in chunks, beside fused softmax attention and beside its token-by-token form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from attnbook.bench.case import Comparison
from attnbook.mechanisms import delta_rule_attention, gated_linear_attention, ssd_attention

LENGTH = 2048


def suite() -> Iterator[Comparison]:
    """Yield the comparisons: forward against both, forward and backward against softmax attention; no goals are set."""
    draws = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draws)

    def log_decays(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=draws).log().requires_grad_()

    q, v = (normal(1, 8, LENGTH, 64).requires_grad_() for _ in range(2))
    k = normalize(normal(1, 8, LENGTH, 64), dim=-1).requires_grad_()
    beta = torch.rand(1, 8, LENGTH, generator=draws).requires_grad_()
    softmax = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    mechanisms = {
        "state-space duality": partial(ssd_attention, q, k, v, log_decays(1, 8, LENGTH)),
        "gated linear attention": partial(gated_linear_attention, q, k, v, log_decays(1, 8, LENGTH, 64)),
        "delta rule": partial(delta_rule_attention, q, k, v, beta),
        "gated delta rule": partial(delta_rule_attention, q, k, v, beta, log_decay=log_decays(1, 8, LENGTH)),
    }
    setting = f"(1, 8, {LENGTH}, 64) float32, causal"
    for name, function in mechanisms.items():
        yield Comparison(
            "state",
            f"{name}, chunked, forward",
            setting,
            torch.no_grad()(function),
            {"SDPA": torch.no_grad()(softmax), "recurrent": torch.no_grad()(partial(function, form="recurrent"))},
            None,
        )
        yield Comparison(
            "state",
            f"{name}, chunked, forward and backward",
            setting,
            lambda function=function: function().sum().backward(),
            {"SDPA": lambda: softmax().sum().backward()},
            None,
        )
