"""Mechanisms that score every pair of query and key."""

from __future__ import annotations

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.functional import attention
from attnbook.mechanisms import hard_attention, local_attention, stored_attention, tiled_attention

ROWS = (
    Mechanism(
        name="scaled dot-product attention",
        function=attention,
        paper="vaswani2017",
        exact=True,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="02-scaled-dot-product",
        specification=reference.attention,
    ),
    Mechanism(
        name="tiled attention",
        function=tiled_attention,
        paper="dao2022",
        exact=True,
        causal="mask",
        time="O(N²D)",
        memory="O(N)",
        chapter="15-flash",
        specification=reference.attention,
        example=lambda shape, generator: {"block_size": 16},
    ),
    Mechanism(
        name="attention with stored weights",
        function=stored_attention,
        paper="vaswani2017",
        exact=True,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="15-flash",
        specification=reference.attention,
        example=lambda shape, generator: {"block_size": 16},
    ),
    Mechanism(
        name="local attention",
        function=local_attention,
        paper="luong2015",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="01-alignment",
        error="softmax inside a window, times a Gaussian around its middle: rows sum to less than one",
        specification=reference.local_attention,
        example=lambda shape, generator: {"half_window": 6},
    ),
    Mechanism(
        name="hard attention",
        function=hard_attention,
        paper="xu2015",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="01-alignment",
        error="one value, drawn with the weights as probabilities; its mean is softmax attention",
        specification=None,
    ),
)
