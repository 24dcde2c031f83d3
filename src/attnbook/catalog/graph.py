"""Mechanisms whose pairs are the edges of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.mechanisms import graph_attention, graph_attention_v2
from attnbook.shapes import AttentionShape


def _draw(shape: AttentionShape, generator: Generator, *names: str) -> dict[str, Any]:
    """Draw a graph of S nodes and about 3 S edges, none of which enters the last node; and a vector for each name."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    edges = torch.randint(0, shape.S, (2, 3 * shape.S), generator=generator)
    return {
        "features": normal(shape.S, shape.H, shape.D),
        "edge_index": edges[:, edges[1] < max(shape.S - 1, 1)],
        **{name: normal(shape.H, shape.D) for name in names},
    }


def _example(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    return _draw(shape, generator, "source_vector", "target_vector")


def _example_v2(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    given = _draw(shape, generator, "vector")
    return {**given, "target_features": given["features"].flip(0)}


_ROW: dict[str, Any] = {
    "exact": False,
    "causal": "no",
    "time": "O(N + M)",
    "chapter": "29-graphs",
    "masks": "none",
    "inputs": (),
}

ROWS = (
    Mechanism(
        name="graph attention",
        function=graph_attention,
        paper="velickovic2018",
        memory="O(N + M)",
        error="softmax over the M edges of a graph, of an additive score in which all nodes prefer the same neighbour",
        specification=reference.graph_attention,
        example=_example,
        **_ROW,
    ),
    Mechanism(
        name="graph attention v2",
        function=graph_attention_v2,
        paper="brody2022",
        memory="O(N + MD)",
        error="softmax over the M edges of a graph, of an additive score",
        specification=reference.graph_attention_v2,
        example=_example_v2,
        **_ROW,
    ),
)
