"""Mechanisms with other queries, keys or scores: learned queries, latent keys, relative positions, correspondence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.mechanisms import (
    alibi_attention,
    convolutional_spatial_transformer,
    disentangled_attention,
    hopfield_retrieve,
    induced_set_attention,
    latent_attention,
    music_attention,
    perceiver_attention,
    rotary_attention,
    shaw_attention,
    soft_match,
    t5_attention,
    transformer_xl_attention,
)
from attnbook.shapes import AttentionShape


def _normal(generator: Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _hopfield(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    state, patterns = _normal(generator, shape.B, shape.L, shape.D), _normal(generator, shape.S, shape.D)
    return {"state": state, "patterns": patterns, "beta": 0.5, "steps": 2}


def _latent(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    latent_dim, rope_dim = 5, 4
    return {
        "query": _normal(generator, shape.B, shape.H, shape.L, shape.D),
        "latent": _normal(generator, shape.B, shape.S, latent_dim),
        "key_up": _normal(generator, shape.H, shape.D, latent_dim) * latent_dim**-0.5,
        "value_up": _normal(generator, shape.H, shape.Dv, latent_dim) * latent_dim**-0.5,
        "query_rope": _normal(generator, shape.B, shape.H, shape.L, rope_dim),
        "key_rope": _normal(generator, shape.B, shape.S, rope_dim),
    }


def _perceiver(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    return {
        "latents": _normal(generator, shape.H, 3, shape.D),
        "key": _normal(generator, shape.B, shape.Hkv, shape.S, shape.D),
        "value": _normal(generator, shape.B, shape.Hkv, shape.S, shape.Dv),
    }


def _shaw(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    tables = {"key_table": _normal(generator, 9, shape.D), "value_table": _normal(generator, shape.H, 7, shape.Dv)}
    return {name: 0.5 * table for name, table in tables.items()}


def _transformer_xl(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    return {
        "position_key": _normal(generator, shape.H, shape.L + shape.S - 1, shape.D),
        "content_bias": _normal(generator, shape.H, shape.D),
        "position_bias": _normal(generator, shape.H, shape.D),
    }


def _disentangled(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    size = (shape.H, 10, shape.D)
    return {"position_key": _normal(generator, *size), "position_query": _normal(generator, *size)}


def _patches(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    height, width = 3, 1 + shape.L % 4
    still = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)[..., None, None]
    change = 0.4 * _normal(generator, shape.B, 2, 3, height, width)
    return {"features": _normal(generator, shape.B, shape.D, height, width), "affine": still + change}


def _maps(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    source = _normal(generator, shape.B, shape.D, 2, 1 + shape.L % 5)
    return {"source": source, "target": _normal(generator, shape.B, shape.D, 3, 1 + shape.S % 5), "scale": 3.0}


ROWS = (
    Mechanism(
        name="Hopfield retrieval",
        function=hopfield_retrieve,
        paper="ramsauer2021",
        exact=False,
        causal="no",
        time="O(N²D)",
        memory="O(N²)",
        chapter="08-hopfield",
        error="softmax attention with the patterns as keys and values, repeated: descent on an energy",
        specification=reference.hopfield_retrieve,
        masks="none",
        inputs=(),
        example=_hopfield,
    ),
    Mechanism(
        name="multi-head latent attention",
        function=latent_attention,
        paper="deepseek2024",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N)",
        chapter="03-multi-head",
        error="softmax attention whose keys and values have the rank of one latent vector a position",
        specification=reference.latent_attention,
        inputs=(),
        example=_latent,
    ),
    Mechanism(
        name="Perceiver cross-attention",
        function=perceiver_attention,
        paper="jaegle2021",
        exact=False,
        causal="no",
        time="O(NMD)",
        memory="O(N)",
        chapter="26-vision-language",
        error="softmax attention from M learned queries",
        specification=reference.perceiver_attention,
        inputs=(),
        example=_perceiver,
    ),
    Mechanism(
        name="induced set attention",
        function=induced_set_attention,
        paper="lee2019",
        exact=False,
        causal="no",
        time="O(NMD)",
        memory="O(N)",
        chapter="26-vision-language",
        error="softmax attention to M summaries, which softmax attention from M learned queries has made",
        specification=reference.induced_set_attention,
        masks="keys",
        example=lambda shape, generator: {"inducing": _normal(generator, shape.H, 5, shape.D)},
    ),
    Mechanism(
        name="relative positions in keys and values",
        function=shaw_attention,
        paper="shaw2018",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention with a vector of the distance added to each key and value",
        specification=reference.shaw_attention,
        example=_shaw,
    ),
    Mechanism(
        name="Transformer-XL's relative attention",
        function=transformer_xl_attention,
        paper="dai2019",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention with a score of the distance added to the score of the contents",
        specification=reference.transformer_xl_attention,
        example=_transformer_xl,
    ),
    Mechanism(
        name="Music Transformer's relative attention",
        function=music_attention,
        paper="huang2019",
        exact=False,
        causal="always",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention with a vector of the distance added to each key",
        specification=reference.music_attention,
        example=lambda shape, generator: {"table": _normal(generator, shape.H, 12, shape.D)},
    ),
    Mechanism(
        name="disentangled attention",
        function=disentangled_attention,
        paper="he2021",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention with scores of content by position and position by content added",
        specification=reference.disentangled_attention,
        example=_disentangled,
    ),
    Mechanism(
        name="T5's relative bias",
        function=t5_attention,
        paper="raffel2020",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention, unscaled, with a number for each bucket of distances added to the scores",
        specification=reference.t5_attention,
        example=lambda shape, generator: {
            "table": _normal(generator, 8, shape.H),
            "max_distance": 20,
            "scale": shape.D**-0.5,
        },
    ),
    Mechanism(
        name="ALiBi",
        function=alibi_attention,
        paper="press2022",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention with a penalty proportional to the distance",
        specification=reference.alibi_attention,
    ),
    Mechanism(
        name="rotary attention",
        function=rotary_attention,
        paper="su2024",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="04-position",
        error="softmax attention of queries and keys turned by their positions",
        specification=reference.rotary_attention,
    ),
    Mechanism(
        name="convolutional spatial transformer",
        function=convolutional_spatial_transformer,
        paper="choy2016",
        exact=False,
        causal="no",
        time="O(NK²D)",
        memory="O(NK²D)",
        chapter="27-correspondence",
        error="no softmax: each patch is sampled in a frame of its own",
        specification=reference.convolutional_spatial_transformer,
        masks="none",
        inputs=(),
        example=_patches,
    ),
    Mechanism(
        name="soft matching",
        function=soft_match,
        paper="kendall2017",
        exact=False,
        causal="no",
        time="O(N²D)",
        memory="O(N²)",
        chapter="27-correspondence",
        error="softmax attention by cosines, with positions as values",
        specification=reference.soft_match,
        masks="none",
        inputs=(),
        example=_maps,
    ),
)
