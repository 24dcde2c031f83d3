"""Causal mechanisms with a matrix-valued state that decays or is corrected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.mechanisms import delta_rule_attention, gated_linear_attention, retention_attention, ssd_attention
from attnbook.shapes import AttentionShape


def _uniform(generator: Generator, *size: int) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _strengths(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """β between 0 and 1 / D: stable for keys whose components are of size 1."""
    return {"beta": _uniform(generator, shape.B, shape.H, shape.L) / shape.D, "chunk_size": 16}


def _decays(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """One decay a token, some of them strong."""
    return {"log_decay": _uniform(generator, shape.B, shape.H, shape.L).log(), "chunk_size": 16}


def _channel_decays(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """One decay a token and channel, some of them strong."""
    return {"log_decay": _uniform(generator, shape.B, shape.H, shape.L, shape.D).log(), "chunk_size": 16}


def _head_decays(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    """One decay a head."""
    return {"gamma": 0.5 + 0.4 * _uniform(generator, shape.H), "chunk_size": 16}


# In the costs C is the size of a chunk; they are those of the chunked form.
ROWS = (
    Mechanism(
        name="delta rule",
        function=delta_rule_attention,
        paper="schlag2021",
        exact=False,
        causal="always",
        time="O(NCD + ND²)",
        memory="O(NC + ND²/C)",
        chapter="09-kernels",
        error="reads a memory in which each token corrects, by a share β, what is stored under its key; not normalised",
        specification=reference.delta_rule_attention,
        masks="keys",
        lengths="equal",
        example=_strengths,
    ),
    Mechanism(
        name="gated linear attention",
        function=gated_linear_attention,
        paper="yang2024",
        exact=False,
        causal="always",
        time="O(NCD + ND²)",
        memory="O(NC + ND²/C)",
        chapter="17-linear",
        error="linear attention, not normalised, whose memory decays in each channel of the key at a rate of its own",
        specification=reference.gated_linear_attention,
        masks="keys",
        lengths="equal",
        example=_channel_decays,
    ),
    Mechanism(
        name="state-space duality (Mamba-2)",
        function=ssd_attention,
        paper="dao2024b",
        exact=False,
        causal="always",
        time="O(NCD + ND²)",
        memory="O(NC + ND²/C)",
        chapter="09-kernels",
        error="linear attention, not normalised, whose memory decays as a whole at a rate that each token sets",
        specification=reference.ssd_attention,
        masks="keys",
        lengths="equal",
        example=_decays,
    ),
    Mechanism(
        name="retention",
        function=retention_attention,
        paper="sun2023",
        exact=False,
        causal="always",
        time="O(NCD + ND²)",
        memory="O(NC + ND²/C)",
        chapter="17-linear",
        error="linear attention, not normalised, whose memory decays at a rate fixed for each head",
        specification=reference.retention_attention,
        masks="keys",
        lengths="equal",
        example=_head_decays,
    ),
)
