"""The bidirectional encoder: BERT's shape, with heads for masked words and for sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.layers import ACTIVATIONS, GATED, TransformerBlock, make_norm, run_blocks
from attnbook.shapes import check_choice, check_count, check_tensor, mismatch, tensor_shape


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an :class:`Encoder`. The defaults are BERT's manner ({cite}`devlin2019`).

    Attributes:
        vocab_size: V.
        context_length: the most positions that the model takes.
        width: E.
        depth: number of blocks.
        num_heads: H.
        hidden: width of the feed-forward networks; 4E by default.
        segments: number of segment embeddings; 0 for none.
        norm_first: pre-norm rather than post-norm.
        norm_eps: what the norms add to the variance.
        activation: as for :class:`attnbook.layers.FeedForward`.
        pooler: give it the dense layer with tanh on top of the first position.
        dropout: of the embeddings, the weights and what each part adds.
        init_std: standard deviation of the first weights.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    hidden: int | None = None
    segments: int = 2
    norm_first: bool = False
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pooler: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        check_count("segments", self.segments, least=0)
        check_choice("activation", self.activation, ACTIVATIONS)

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Count the parameters by formula, the pooler included, heads for tasks not.

        Args:
            embeddings: count the embeddings of tokens, positions and segments, and their norm, too.
        """
        E, hidden = self.width, self.hidden or 4 * self.width
        up = 2 if self.activation in GATED else 1
        attention = 4 * (E * E + E)
        feed_forward = (up + 1) * E * hidden + up * hidden + E
        count = self.depth * (attention + feed_forward + 4 * E)
        count += E * E + E if self.pooler else 0
        count += 2 * E if self.norm_first else 0
        if embeddings:
            count += (self.vocab_size + self.context_length + self.segments + 2) * E
        return count


class Encoder(nn.Module):
    """Read a sequence in both directions at once ({cite}`devlin2019`).

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.embedding = nn.Embedding(config.vocab_size, E)
        self.position = nn.Parameter(torch.empty(config.context_length, E))
        self.segment = nn.Embedding(config.segments, E) if config.segments else None
        self.embedding_norm = make_norm("layer", E, config.norm_eps)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                E,
                config.num_heads,
                hidden=config.hidden,
                norm_first=config.norm_first,
                norm_eps=config.norm_eps,
                activation=config.activation,
                dropout=config.dropout,
            )
            for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E, config.norm_eps) if config.norm_first else nn.Identity()
        self.pooler = nn.Linear(E, E) if config.pooler else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.position, std=self.config.init_std)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        return_trace: bool = False,
    ) -> Any:
        """Turn tokens into vectors that know of their context.

        Args:
            tokens: (B, L) integers below V.
            mask: (B, L) bool, True at real tokens; all of them by default.
            segments: (B, L) integers below the number of segments; zeros by default.
            return_trace: return what every block did, too.
        Returns:
            (B, L, E); with return_trace also a :class:`attnbook.layers.Trace`.
        Raises:
            ValueError: shapes that do not match, more positions than the context length.
        """
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        if tokens.shape[1] > self.config.context_length:
            raise mismatch("tokens", f"at most {self.config.context_length} positions", f"{tokens.shape[1]}")
        for name, given in (("mask", mask), ("segments", segments)):
            if given is not None and given.shape != tokens.shape:
                raise mismatch(name, f"shape {tuple(tokens.shape)}, that of tokens", tensor_shape(given))
        if mask is not None:
            mask = check_tensor("mask", mask, "B L", dtypes=(torch.bool,))[:, None, None, :]
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if segments is None else segments)
        elif segments is not None:
            raise mismatch("segments", "None: this model has no segments", segments)
        x = self.dropout(self.embedding_norm(x))
        if return_trace:
            x, trace = run_blocks(self.blocks, x, attn_mask=mask)
            return self.norm(x), trace
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.norm(x)

    def pool(self, states: Tensor) -> Tensor:
        """Summarise a sequence by its first position: tanh of a dense layer.

        Args:
            states: (B, L, E), from :meth:`forward`.
        Returns:
            (B, E).
        Raises:
            ValueError: the model has no pooler.
        """
        if self.pooler is None:
            raise mismatch("pooler", "a model with pooler=True in its configuration", "one without")
        return torch.tanh(self.pooler(states[:, 0]))


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Average the vectors of the real tokens, and scale to length 1: a sentence's embedding ({cite}`reimers2019`).

    Args:
        states: (B, L, E).
        mask: (B, L) bool, True at real tokens.
    Returns:
        (B, E), each of Euclidean length 1; zero where no token is real.
    Raises:
        ValueError: shapes that do not match, a mask that is not boolean.
    """
    check_tensor("states", states, "B L E")
    check_tensor("mask", mask, "B L", dtypes=(torch.bool,))
    if mask.shape != states.shape[:2]:
        raise mismatch("mask", f"shape {tuple(states.shape[:2])}", tensor_shape(mask))
    kept = mask[..., None].to(states.dtype)
    mean = (states * kept).sum(1) / kept.sum(1).clamp(min=1)
    return nn.functional.normalize(mean, dim=-1)


class MaskedLanguageHead(nn.Module):
    """Score every token of the vocabulary at every position, with the embedding as output projection.

    Args:
        encoder: whose embedding is shared.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        config = encoder.config
        self.transform = nn.Linear(config.width, config.width)
        self.norm = make_norm("layer", config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size)
        self.output.weight = encoder.embedding.weight

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, L, E) to scores (B, L, V)."""
        return self.output(self.norm(nn.functional.gelu(self.transform(states))))
