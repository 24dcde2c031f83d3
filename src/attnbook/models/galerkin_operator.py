"""A Transformer between functions: Galerkin and Fourier attention, without softmax, over the points of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.functional import attention
from attnbook.layers import FeedForward
from attnbook.mechanisms import fourier_attention, galerkin_attention
from attnbook.models.count import linear, network
from attnbook.shapes import check_choice, check_count, check_probability, check_tensor, mismatch, tensor_shape

KINDS = ("galerkin", "fourier", "softmax")


@dataclass(frozen=True)
class GalerkinOperatorConfig:
    """The shape of a :class:`GalerkinOperator`.

    Attributes:
        channels: numbers that describe the input function at a point.
        outputs: numbers that describe the output function there.
        coordinates: d, dimensions of the domain.
        width: E.
        depth: number of blocks.
        num_heads: H.
        kind: of attention: "galerkin", "fourier", or "softmax" to compare with.
        hidden: width of the feed-forward networks; 4E by default.
        dropout: of what each part adds.
    """

    channels: int
    outputs: int
    coordinates: int
    width: int
    depth: int
    num_heads: int
    kind: str = "galerkin"
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channels", "outputs", "coordinates", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        check_choice("kind", self.kind, KINDS)
        check_probability("dropout", self.dropout)
        if self.width % self.num_heads:
            raise mismatch("num_heads", f"a divisor of width = {self.width}", self.num_heads)

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E, d = self.width, self.coordinates
        joined = E + self.num_heads * d  # every head has the coordinates beside its own numbers
        mixing = 3 * linear(E, E) + linear(joined, E) + (0 if self.kind == "softmax" else 4 * joined)
        feed_forward = network([E, self.hidden or 4 * E, E])
        return network([self.channels + d, E, E]) + self.depth * (mixing + feed_forward) + network([E, E, self.outputs])


class OperatorAttention(nn.Module):
    """Attend over points, with their coordinates beside each head's queries, keys and values ({cite}`cao2021`).

    Weights start small and near-diagonal, 0.01 · (Xavier + identity), as the paper recommends for attention that no
    softmax keeps in bounds.

    Args:
        width: E.
        num_heads: H.
        coordinates: d.
        kind: "galerkin", "fourier" or "softmax".
    """

    def __init__(self, width: int, num_heads: int, coordinates: int, *, kind: str):
        super().__init__()
        self.kind, self.num_heads = kind, num_heads
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        joined = width // num_heads + coordinates
        self.output = nn.Linear(num_heads * joined, width)
        if kind != "softmax":  # of the two that are normalised
            self.scales = nn.ParameterList(torch.ones(num_heads, joined) for _ in range(2))
            self.shifts = nn.ParameterList(torch.zeros(num_heads, joined) for _ in range(2))
        for projection in self.projections:
            nn.init.xavier_uniform_(projection.weight, gain=0.01)
            projection.weight.data += 0.01 * torch.eye(width)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        """Mix the vectors (B, N, E) of points (B, N, d): (B, N, E)."""
        places = points[:, None].expand(-1, self.num_heads, -1, -1)  # (B, H, N, d)
        query, key, value = (
            torch.cat([project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), places], -1)
            for project in self.projections
        )
        if self.kind == "softmax":
            mixed = attention(query, key, value)
        else:
            apply, names = (
                (galerkin_attention, ("key", "value"))
                if self.kind == "galerkin"
                else (fourier_attention, ("query", "key"))
            )
            options = {f"{name}_scale": scale for name, scale in zip(names, self.scales, strict=True)}
            options |= {f"{name}_shift": shift for name, shift in zip(names, self.shifts, strict=True)}
            mixed = apply(query, key, value, **options)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, H, N, D + d) → (B, N, H·(D + d)) → (B, N, E)


class GalerkinOperator(nn.Module):
    """Map a function, known at points, to another at the same points ({cite}`cao2021`).

    The number of points is free: a model trained on a coarse grid may be asked on a fine one, as attention without
    softmax is a quadrature that refines. Its cost is linear in their number. Differs from the paper: points are decoded
    each on its own, where it has two spectral convolutions behind the attention for regular grids; two-dimensional
    problems are not coarsened first by convolutions; and the coordinates pass through the layer norms with the rest.

    Args:
        config: its shape.
    """

    def __init__(self, config: GalerkinOperatorConfig):
        super().__init__()
        self.config = config
        E, d = config.width, config.coordinates
        self.lift = nn.Sequential(nn.Linear(config.channels + d, E), nn.GELU(), nn.Linear(E, E))
        self.mixing = nn.ModuleList(
            OperatorAttention(E, config.num_heads, d, kind=config.kind) for _ in range(config.depth)
        )
        self.feed_forward = nn.ModuleList(FeedForward(E, config.hidden) for _ in range(config.depth))
        self.lower = nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, config.outputs))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, function: Tensor, points: Tensor) -> Tensor:
        """Apply the operator.

        Args:
            function: (B, N, channels), the input function at N points.
            points: (B, N, d) or (N, d), their coordinates.
        Returns:
            (B, N, outputs).
        Raises:
            ValueError: shapes that do not match.
        """
        check_tensor("function", function, "B N channels")
        config = self.config
        if function.shape[-1] != config.channels:
            raise mismatch("function", f"last axis {config.channels}", tensor_shape(function))
        wanted = (*function.shape[:2], config.coordinates)
        check_tensor("points", points, "... N d")
        if tuple(points.shape) not in (wanted, wanted[1:]):
            raise mismatch("points", f"shape {wanted} or {wanted[1:]}", tensor_shape(points))
        points = points.expand(wanted)
        x = self.lift(torch.cat([function, points], -1))
        for mix, feed_forward in zip(self.mixing, self.feed_forward, strict=True):
            x = x + self.dropout(mix(x, points))  # no norm on the stream
            x = x + self.dropout(feed_forward(x))
        return self.lower(x)
