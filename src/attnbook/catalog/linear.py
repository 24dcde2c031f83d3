"""Mechanisms whose time grows linearly with the sequence, and whose state, where they have one, does not fade."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from attnbook import reference
from attnbook.catalog.row import Mechanism
from attnbook.mechanisms import (
    cosformer_attention,
    fourier_attention,
    galerkin_attention,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    performer_attention,
    random_feature_attention,
)
from attnbook.shapes import AttentionShape


def _random_vectors(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    vectors = torch.randn(24, shape.D, generator=generator, dtype=torch.float64)
    return {"projection": vectors, "chunk_size": 16}


def _mixtures(shape: AttentionShape, generator: Generator) -> dict[str, Any]:
    mixtures = torch.randn(2, shape.H, 8, shape.S, generator=generator, dtype=torch.float64) * shape.S**-0.5
    return {"projection_key": mixtures[0], "projection_value": mixtures[1]}


def _affine(names: dict[str, tuple[int, int]], generator: Generator) -> dict[str, Any]:
    """Make scales near 1 and shifts near 0, (heads, width) each."""
    made: dict[str, Any] = {"chunk_size": 16}
    for name, (heads, width) in names.items():
        made[f"{name}_scale"] = 1 + torch.randn(heads, width, generator=generator, dtype=torch.float64) / 4
        made[f"{name}_shift"] = torch.randn(heads, width, generator=generator, dtype=torch.float64) / 4
    return made


ROWS = (
    Mechanism(
        name="linear attention",
        function=linear_attention,
        paper="katharopoulos2020",
        exact=False,
        causal="mask",
        time="O(ND²)",
        memory="O(ND)",
        chapter="17-linear",
        error="weights φ(q)·φ(k) in place of exp(q·k), divided by the row's sum",
        masks="keys",
        specification=reference.linear_attention,
        example=lambda shape, generator: {"chunk_size": 16},
    ),
    Mechanism(
        name="Performer (FAVOR+)",
        function=performer_attention,
        paper="choromanski2021",
        exact=False,
        causal="mask",
        time="O(NmD)",
        memory="O(Nm)",
        chapter="09-kernels",
        error="estimates softmax attention; the error falls as m^-1/2 in the number m of random features",
        masks="keys",
        specification=reference.performer_attention,
        example=_random_vectors,
    ),
    Mechanism(
        name="random feature attention",
        function=random_feature_attention,
        paper="peng2021",
        exact=False,
        causal="mask",
        time="O(NmD)",
        memory="O(Nm)",
        chapter="09-kernels",
        error="estimates softmax attention between unit vectors; the error falls as m^-1/2",
        masks="keys",
        specification=reference.random_feature_attention,
        example=lambda shape, generator: _random_vectors(shape, generator) | {"bandwidth": 1.5},
    ),
    Mechanism(
        name="Linformer",
        function=linformer_attention,
        paper="wang2020",
        exact=False,
        causal="no",
        time="O(NkD)",
        memory="O(Nk)",
        chapter="17-linear",
        error="softmax over k mixtures of the keys; exact where the mixtures are the keys",
        masks="keys",
        specification=reference.linformer_attention,
        example=_mixtures,
    ),
    Mechanism(
        name="Nyströmformer",
        function=nystrom_attention,
        paper="xiong2021",
        exact=False,
        causal="no",
        time="O(NmD + m³)",
        memory="O(Nm)",
        chapter="17-linear",
        error="weights of rank m at most; exact with a landmark at every position, once the inverse has converged",
        masks="keys",
        specification=reference.nystrom_attention,
        example=lambda shape, generator: {"num_landmarks": 6},
    ),
    Mechanism(
        name="cosFormer",
        function=cosformer_attention,
        paper="qin2022",
        exact=False,
        causal="mask",
        time="O(ND²)",
        memory="O(ND)",
        chapter="17-linear",
        error="weights relu(q)·relu(k) times a cosine of the distance, divided by the row's sum",
        masks="keys",
        specification=reference.cosformer_attention,
        example=lambda shape, generator: {"chunk_size": 16},
    ),
    Mechanism(
        name="Galerkin attention",
        function=galerkin_attention,
        paper="cao2021",
        exact=False,
        causal="mask",
        time="O(ND²)",
        memory="O(ND)",
        chapter="31-pde",
        error="the mean over keys of (q·k) v, keys and values layer-normalised; weights may be negative",
        masks="keys",
        specification=reference.galerkin_attention,
        example=lambda shape, generator: _affine(
            {"key": (shape.Hkv, shape.D), "value": (shape.Hkv, shape.Dv)}, generator
        ),
    ),
    Mechanism(
        name="Fourier attention",
        function=fourier_attention,
        paper="cao2021",
        exact=False,
        causal="mask",
        time="O(ND²)",
        memory="O(ND)",
        chapter="31-pde",
        error="the mean over keys of (q·k) v, queries and keys layer-normalised; weights may be negative",
        masks="keys",
        specification=reference.fourier_attention,
        example=lambda shape, generator: _affine({"query": (shape.H, shape.D), "key": (shape.Hkv, shape.D)}, generator),
    ),
)
