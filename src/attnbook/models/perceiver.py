"""The Perceiver: a few latents read an input of any length, think, and answer any number of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.layers import CrossBlock, TransformerBlock
from attnbook.shapes import check_count, check_tensor, mismatch, tensor_shape


@dataclass(frozen=True)
class PerceiverConfig:
    """The shape of a :class:`Perceiver`.

    Attributes:
        input_width: of the input's vectors.
        num_latents: M.
        width: E of the latents.
        depth: blocks of self-attention among the latents after each read.
        num_heads: H of these blocks.
        cross_heads: of the attention to the input, and of the queries'.
        repeats: how often the input is read, each time by the same weights.
        hidden: width of the feed-forward networks; 4E by default, four times the queries' width at the output.
        query_width: of the output queries; None for a model that returns its latents.
        num_queries: of learned queries; None where the caller brings them.
        output_width: of the answers; that of the queries by default.
        dropout: of the weights and what each part adds.
    """

    input_width: int
    num_latents: int
    width: int
    depth: int
    num_heads: int
    cross_heads: int = 1
    repeats: int = 1
    hidden: int | None = None
    query_width: int | None = None
    num_queries: int | None = None
    output_width: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_width", "num_latents", "width", "depth", "num_heads", "cross_heads", "repeats"):
            check_count(name, getattr(self, name))
        for name in ("query_width", "num_queries", "output_width"):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
                if self.query_width is None:
                    raise mismatch(name, "None where there is no query_width", value)

    def num_parameters(self) -> int:
        """Count the parameters by formula."""

        def block(width: int, memory_width: int | None = None) -> int:
            source = width if memory_width is None else memory_width
            hidden = self.hidden or 4 * width
            norms = 4 * width + (0 if memory_width is None else 2 * source)
            return 2 * width * width + 2 * source * width + 4 * width + 2 * width * hidden + hidden + width + norms

        E, Q = self.width, self.query_width
        count = self.num_latents * E + block(E, self.input_width) + self.depth * block(E)
        if Q is not None:
            count += block(Q, E) + (Q + 1) * (self.output_width or Q) + (self.num_queries or 0) * Q
        return count


class Perceiver(nn.Module):
    """Read an input through a few latents, and answer queries from them ({cite}`jaegle2021,jaegle2022`).

    The cost is linear in the input and in the queries; all depth is spent on the latents. The input has no order but
    what its vectors tell of it. Differs from the first paper: all reads share their weights, the first one's too;
    position features are the caller's (:func:`attnbook.models.patches.sinusoidal_grid`, say).

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: PerceiverConfig):
        super().__init__()
        self.config = config
        options = {"hidden": config.hidden, "dropout": config.dropout}
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.width))
        nn.init.trunc_normal_(self.latents, std=0.02)
        self.read = CrossBlock(config.width, config.cross_heads, memory_width=config.input_width, **options)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.num_heads, **options) for _ in range(config.depth)
        )
        self.queries = self.answer = self.output = None
        if config.query_width is not None:
            self.answer = CrossBlock(config.query_width, config.cross_heads, memory_width=config.width, **options)
            self.output = nn.Linear(config.query_width, config.output_width or config.query_width)
        if config.num_queries is not None:
            self.queries = nn.Parameter(torch.empty(config.num_queries, config.query_width))
            nn.init.trunc_normal_(self.queries, std=0.02)

    def encode(self, inputs: Tensor, *, mask: Tensor | None = None, need_weights: bool = False) -> Any:
        """Read an input.

        Args:
            inputs: (B, S, input_width).
            mask: (B, S) bool, True at real positions; all of them by default.
            need_weights: return the weights of each read too.
        Returns:
            The latents (B, M, E); with need_weights also a list of (B, cross_heads, M, S).
        Raises:
            ValueError: shapes that do not match.
        """
        check_tensor("inputs", inputs, "B S input_width")
        if mask is not None:
            if check_tensor("mask", mask, "B S", dtypes=(torch.bool,)).shape != inputs.shape[:2]:
                raise mismatch("mask", f"shape {tuple(inputs.shape[:2])}, that of inputs", tensor_shape(mask))
            mask = mask[:, None, None, :]
        x, weights = self.latents.expand(len(inputs), -1, -1), []
        for _ in range(self.config.repeats):
            x, seen = self._read(x, inputs, mask, need_weights)
            weights.append(seen)
            for block in self.blocks:
                x = block(x)
        return (x, weights) if need_weights else x

    def _read(self, x: Tensor, inputs: Tensor, mask: Tensor | None, need_weights: bool) -> tuple[Tensor, Any]:
        made = self.read(x, inputs, memory_mask=mask, need_weights=need_weights)
        return made if need_weights else (made, None)

    def decode(self, latents: Tensor, queries: Tensor | None = None) -> Tensor:
        """Answer queries.

        Args:
            latents: (B, M, E), from :meth:`encode`.
            queries: (B, Q, query_width); none where they are learned.
        Returns:
            (B, Q, output_width).
        Raises:
            ValueError: queries missing or not wanted, shapes that do not match.
        """
        if self.answer is None:
            raise mismatch("query_width", "a model with output queries in its configuration", "one without")
        if (queries is None) != (self.queries is not None):
            wanted = "a tensor (B, Q, query_width)" if self.queries is None else "None: this model has its own"
            raise mismatch("queries", wanted, queries)
        queries = self.queries.expand(len(latents), -1, -1) if queries is None else queries
        return self.output(self.answer(queries, latents))

    def forward(self, inputs: Tensor, queries: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Read an input and answer queries about it; without output queries, return the latents.

        Args:
            inputs: (B, S, input_width).
            queries: (B, Q, query_width); none where they are learned, or there are none.
            mask: (B, S) bool, True at real positions; all of them by default.
        Returns:
            (B, Q, output_width), or (B, M, E).
        Raises:
            ValueError: as for :meth:`encode` and :meth:`decode`.
        """
        latents = self.encode(inputs, mask=mask)
        return latents if self.answer is None and queries is None else self.decode(latents, queries)
