"""Mechanisms that score the pairs of a fixed sparse pattern, and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.mechanisms import (
    bigbird_attention,
    block_sparse_attention,
    document_attention,
    global_token_attention,
    longformer_attention,
    sliding_window_attention,
    strided_attention,
)
from attnbook.mechanisms.block_sparse import draw_random_blocks
from attnbook.shapes import AttentionShape

_SIZE = 16  # of a block in the examples


def _global_tokens(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """Make a sixth of the places global, the first among them, differently in every sequence."""
    tokens = torch.rand(shape.B, shape.S, generator=generator) < 1 / 6
    tokens[:, 0] = True
    return {"global_tokens": tokens}


def _layout(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """Allow half of the blocks, others in every head; the first block of queries sees nothing in the first head."""
    rows, columns = -(-shape.L // _SIZE), -(-shape.S // _SIZE)
    layout = torch.rand(shape.H, rows, columns, generator=generator) < 0.5
    layout[0, 0] = False
    layout[1:, -1, -1] = True
    return {"layout": layout, "block_size": _SIZE}


def _bigbird(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """Draw two blocks for each block of queries."""
    drawn = draw_random_blocks(-(-shape.L // _SIZE), 2, window_blocks=1, generator=generator)
    return {"block_size": _SIZE, "window_blocks": 1, "random_blocks": drawn}


def _documents(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """Pack documents, in one piece each in the first sequence, scattered in the others."""
    ids = torch.randint(4, (shape.B, shape.L), generator=generator)
    ids[0] = ids[0].sort().values
    return {"ids": ids}


ROWS = (
    Mechanism(
        name="sliding-window attention",
        function=sliding_window_attention,
        paper="beltagy2020",
        exact=False,
        causal="mask",
        time="O(NwD)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention over the w keys nearest to the query, or every d-th of them",
        specification=reference.sliding_window_attention,
        example=lambda shape, generator: {"window": 7, "dilation": 1 if shape.S % 2 else 3},
    ),
    Mechanism(
        name="strided attention",
        function=strided_attention,
        paper="child2019",
        exact=False,
        causal="mask",
        time="O(N√N·D)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention over the keys nearer than a stride and those whole strides away",
        specification=reference.strided_attention,
        example=lambda shape, generator: {"stride": 8},
    ),
    Mechanism(
        name="attention through global tokens",
        function=global_token_attention,
        paper="beltagy2020",
        exact=False,
        causal="mask",
        time="O(NgD)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention over the pairs in which the query or the key is one of g global tokens",
        specification=reference.global_token_attention,
        example=_global_tokens,
    ),
    Mechanism(
        name="Longformer attention",
        function=longformer_attention,
        paper="beltagy2020",
        exact=False,
        causal="mask",
        time="O(N(w + g)D)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention over a window of w keys and g global tokens",
        specification=reference.longformer_attention,
        example=lambda shape, generator: {"window": 5, "dilation": 2, **_global_tokens(shape, generator)},
    ),
    Mechanism(
        name="BigBird attention",
        function=bigbird_attention,
        paper="zaheer2020",
        exact=False,
        causal="mask",
        time="O(NwD)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention over neighbouring blocks, global ones and a few drawn at random: w keys in all",
        specification=reference.bigbird_attention,
        lengths="equal",
        example=_bigbird,
    ),
    Mechanism(
        name="block-sparse attention",
        function=block_sparse_attention,
        paper="child2019",
        exact=False,
        causal="mask",
        time="O(ρN²D)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention over the blocks of pairs that a layout allows, a share ρ of all",
        specification=reference.block_sparse_attention,
        example=_layout,
    ),
    Mechanism(
        name="attention inside packed documents",
        function=document_attention,
        paper="krell2021",
        exact=False,
        causal="mask",
        time="O(NnD)",
        memory="O(N)",
        chapter="16-sparse",
        error="softmax attention inside each of the documents, n places long, that share a row",
        specification=reference.document_attention,
        lengths="equal",
        example=_documents,
    ),
)
