"""The recurrent memory Transformer: a long text read segment by segment, with a memory handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.layers import TransformerBlock, make_norm
from attnbook.masks import causal
from attnbook.models.count import block
from attnbook.shapes import check_count, check_probability, check_tensor, mismatch


@dataclass(frozen=True)
class RecurrentMemoryConfig:
    """The shape of a :class:`RecurrentMemoryTransformer`.

    Attributes:
        vocab_size: V.
        segment_length: tokens of a segment.
        memory_tokens: m, vectors that are handed from segment to segment; 0 for none.
        width: E.
        depth: number of blocks.
        num_heads: H.
        hidden: width of the feed-forward networks; 4E by default.
        unroll: over how many hand-overs the gradient goes back; all of them by default.
        dropout: of the weights and what each part adds.
    """

    vocab_size: int
    segment_length: int
    memory_tokens: int
    width: int
    depth: int
    num_heads: int
    hidden: int | None = None
    unroll: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "segment_length", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        check_count("memory_tokens", self.memory_tokens, least=0)
        if self.unroll is not None:
            check_count("unroll", self.unroll, least=0)
        check_probability("dropout", self.dropout)

    def num_parameters(self) -> int:
        """Count the parameters by formula; the output is tied to the embedding."""
        E = self.width
        places = self.segment_length + 2 * self.memory_tokens
        tables = (self.vocab_size + places + self.memory_tokens) * E
        return tables + self.depth * block(E, self.hidden) + 2 * E


def memory_mask(memory_tokens: int, length: int, *, device: torch.device | None = None) -> Tensor:
    """Say who may see whom in a segment: [memory to read, tokens, memory to write].

    Tokens see the memory to read and themselves and earlier tokens; the memory to write sees everything; the memory to
    read sees itself alone.

    Args:
        memory_tokens: m.
        length: tokens of the segment.
        device: where to make it.
    Returns:
        (2m + length, 2m + length), bool; True = may attend.
    """
    mask = causal(2 * memory_tokens + length, device=device)
    mask[:memory_tokens, :memory_tokens] = True
    mask[memory_tokens + length :] = True
    return mask


class RecurrentMemoryTransformer(nn.Module):
    """Read a text of any length in segments, and hand a few vectors on from each to the next ({cite}`bulatov2022`).

    A segment stands between two copies of the memory. The copy in front is read by the tokens; the one behind, which
    sees the whole segment, is written, and its last vectors are the next segment's memory. Nothing else passes between
    segments, and attention's cost is linear in the number of segments. Differs from the paper: it adds the tokens to a
    Transformer-XL or another pretrained Transformer, with that model's positions, where ours has learned ones for the
    memory as well as the tokens; the memory that is handed on has gone through the last norm.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: RecurrentMemoryConfig):
        super().__init__()
        self.config = config
        E, m = config.width, config.memory_tokens
        self.embedding = nn.Embedding(config.vocab_size, E)
        self.position = nn.Parameter(torch.empty(config.segment_length + 2 * m, E))
        self.memory = nn.Parameter(torch.empty(m, E))
        self.blocks = nn.ModuleList(
            TransformerBlock(E, config.num_heads, hidden=config.hidden, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E)
        for table in (self.embedding.weight, self.position, self.memory):
            nn.init.normal_(table, std=E**-0.5)

    def read_segment(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read one segment.

        Args:
            tokens: (B, L) integers below V, L at most the segment's length.
            memory: (B, m, E).
        Returns:
            Scores (B, L, V) of each next token, and the memory (B, m, E) for the next segment.
        Raises:
            ValueError: another rank, too many tokens, a memory of another shape.
        """
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        (batch, length), m = tokens.shape, self.config.memory_tokens
        if length > self.config.segment_length:
            raise mismatch("tokens", f"at most {self.config.segment_length} positions", tokens)
        if memory.shape != (batch, m, self.config.width):
            raise mismatch("memory", f"shape {(batch, m, self.config.width)}", memory)
        front, behind = self.position[: m + length], self.position[self.config.segment_length + m :]
        x = torch.cat([memory, self.embedding(tokens), memory], 1) + torch.cat([front, behind])
        mask = memory_mask(m, length, device=x.device)
        for layer in self.blocks:
            x = layer(x, attn_mask=mask)
        _, middle, written = self.norm(x).split([m, length, m], 1)
        return middle @ self.embedding.weight.T, written

    def forward(self, tokens: Tensor, memory: Tensor | None = None, *, return_memory: bool = False) -> Any:
        """Score the token that follows each position.

        Args:
            tokens: (B, L) integers below V, of any length; the last segment may be shorter.
            memory: (B, m, E), of a text that went before; the learned first one by default.
            return_memory: return the memory after the last segment too.
        Returns:
            (B, L, V), unnormalised log-probabilities; with return_memory also (B, m, E).
        Raises:
            ValueError: another rank, a memory of another shape.
        """
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        if memory is None:
            memory = self.memory.expand(len(tokens), -1, -1)
        segments, unroll = tokens.split(self.config.segment_length, 1), self.config.unroll
        logits = []
        for i, segment in enumerate(segments):
            if unroll is not None and i and len(segments) - i > unroll:
                memory = memory.detach()
            scores, memory = self.read_segment(segment, memory)
            logits.append(scores)
        logits = torch.cat(logits, 1)
        return (logits, memory) if return_memory else logits
