"""Mechanisms whose pattern comes from the content."""

from __future__ import annotations

import torch

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.mechanisms import (
    a3_attention,
    data_informed_attention,
    lsh_attention,
    routing_attention,
    topk_attention,
)


def _normal(*size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


ROWS = (
    Mechanism(
        name="top-k attention",
        function=topk_attention,
        paper="zhao2019",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N)",
        chapter="18-approximate",
        error="at most 2 δ max ‖v‖, δ the exact weight of the keys dropped; exact for k ≥ N",
        specification=reference.topk_attention,
        example=lambda shape, generator: {"k": 7, "block_size": 16},
    ),
    Mechanism(
        name="A³",
        function=a3_attention,
        paper="ham2020",
        exact=False,
        causal="no",
        time="O(NMD + N²)",
        memory="O(NMD)",
        chapter="18-approximate",
        error="at most 2 δ max ‖v‖, δ the exact weight of the keys not kept, which falls as M grows",
        specification=reference.a3_attention,
        masks="keys",
        example=lambda shape, generator: {"iterations": 24, "threshold": 0.05, "block_size": 40},
    ),
    Mechanism(
        name="LSH attention (Reformer)",
        function=lsh_attention,
        paper="kitaev2020",
        exact=False,
        causal="mask",
        time="O(R(NC + NBD))",
        memory="O(RN(C + D))",
        chapter="16-sparse",
        error="softmax over the keys that share a bucket and a chunk in one of R rounds; exact with one of each",
        specification=reference.lsh_attention,
        masks="keys",
        lengths="equal",
        example=lambda shape, generator: {
            "rotations": _normal(3, shape.D, 2, generator=generator),
            "chunk_size": 16,
        },
    ),
    Mechanism(
        name="routing attention",
        function=routing_attention,
        paper="roy2021",
        exact=False,
        causal="mask",
        time="O(N^1.5 D)",
        memory="O(N^1.5)",
        chapter="16-sparse",
        error="softmax within clusters of queries and keys; exact with one cluster of all",
        specification=reference.routing_attention,
        masks="keys",
        lengths="equal",
        example=lambda shape, generator: {
            "centroids": _normal(shape.H, 4, shape.D, generator=generator),
            "window": 20,
        },
    ),
    Mechanism(
        name="data-informed sparse attention",
        function=data_informed_attention,
        paper="rugina2020",
        exact=False,
        causal="mask",
        time="O(PD)",
        memory="O(P)",
        chapter="16-sparse",
        error="softmax over the pairs of a fixed pattern, P with those between them; exact where the pattern has all",
        specification=reference.data_informed_attention,
        example=lambda shape, generator: {
            "pattern": (torch.rand(shape.H, shape.L, shape.S, generator=generator) < 0.3).index_fill(
                2, torch.tensor([0]), True
            ),
            "block_size": 16,
        },
    ),
)
