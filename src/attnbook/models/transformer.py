"""The encoder–decoder Transformer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnbook.cache import StaticCache
from attnbook.layers import NORMS, TransformerBlock, make_caches
from attnbook.positions import RotaryEmbedding, sinusoidal
from attnbook.shapes import check_choice, check_count, check_tensor, mismatch

POSITIONS = ("sinusoidal", "rotary", "none")


class TransformerState(NamedTuple):
    """What greedy decoding carries from step to step.

    Attributes:
        memory: (B, S, E), the encoder's output.
        mask: (B, 1, 1, S) bool, True at real source positions.
        caches: of the decoder's self-attention, one for each block.
    """

    memory: Tensor
    mask: Tensor
    caches: list[StaticCache]


class Transformer(nn.Module):
    """Translate one sequence into another by attention alone ({cite}`vaswani2017`).

    Differs from the paper's text in one default: the norms stand before the parts, with one more after the last block,
    as in the authors' later code; ``norm_first=False`` gives the published form.

    Args:
        source_vocab: number of source tokens.
        target_vocab: number of target tokens.
        width: E.
        depth: number of blocks of the encoder, and of the decoder.
        num_heads: H.
        hidden: width of the feed-forward networks; 4E by default.
        max_length: the most positions of either side.
        position: "sinusoidal", "rotary" (in self-attention) or "none".
        norm_first: pre-norm rather than post-norm.
        activation: as for :class:`attnbook.layers.FeedForward`.
        embedding_scale: factor of the token embeddings; √E by default, as in the paper.
        dropout: of embeddings, weights, and what each part adds, in training.
        pad: the token that fills up sources; it gets no weight.
    Raises:
        ValueError: sizes that are impossible.
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        width: int,
        depth: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        max_length: int = 512,
        position: str = "sinusoidal",
        norm_first: bool = True,
        activation: str = "relu",
        embedding_scale: float | None = None,
        dropout: float = 0.0,
        pad: int = 0,
    ):
        super().__init__()
        sizes = {"source_vocab": source_vocab, "target_vocab": target_vocab}
        for name, size in {**sizes, "width": width, "depth": depth, "num_heads": num_heads}.items():
            check_count(name, size)
        check_choice("position", position, POSITIONS)
        self.pad, self.max_length = pad, check_count("max_length", max_length)
        self.scale = width**0.5 if embedding_scale is None else embedding_scale
        self.source_embedding = nn.Embedding(source_vocab, width)
        self.target_embedding = nn.Embedding(target_vocab, width)
        table = sinusoidal(max_length, width) if position == "sinusoidal" else torch.zeros(max_length, width)
        self.register_buffer("position", table, persistent=False)
        options = {"hidden": hidden, "norm_first": norm_first, "activation": activation, "dropout": dropout}
        options["rotary"] = RotaryEmbedding(width // num_heads) if position == "rotary" else None
        self.encoder = nn.ModuleList(TransformerBlock(width, num_heads, **options) for _ in range(depth))
        self.decoder = nn.ModuleList(
            TransformerBlock(width, num_heads, cross_attention=True, **options) for _ in range(depth)
        )
        self.encoder_norm = NORMS["layer"](width) if norm_first else nn.Identity()
        self.decoder_norm = NORMS["layer"](width) if norm_first else nn.Identity()
        self.output = nn.Linear(width, target_vocab)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=1 / self.scale)

    def _embed(self, name: str, tokens: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        check_tensor(name, tokens, "B L", dtypes=(torch.int64,))
        end = start + tokens.shape[1]
        if end > self.max_length:
            raise mismatch(name, f"at most max_length = {self.max_length} positions", f"{end}")
        return self.dropout(embedding(tokens) * self.scale + self.position[start:end])

    def encode(self, source: Tensor) -> TransformerState:
        """Read a source.

        Args:
            source: (B, S) integers; padding behind.
        Returns:
            The state from which decoding starts.
        Raises:
            ValueError: another rank, or more positions than max_length.
        """
        memory = self._embed("source", source, self.source_embedding)
        mask = (source != self.pad)[:, None, None, :]
        for block in self.encoder:
            memory = block(memory, attn_mask=mask)
        return TransformerState(self.encoder_norm(memory), mask, [])

    def _decode(self, target: Tensor, state: TransformerState) -> Tensor:
        start = state.caches[0].length if state.caches else 0
        x = self._embed("target", target, self.target_embedding, start)
        for i, block in enumerate(self.decoder):
            x = block(
                x,
                memory=state.memory,
                memory_mask=state.mask,
                is_causal=True,
                cache=state.caches[i] if state.caches else None,
            )
        return self.output(self.decoder_norm(x))

    def decode_step(self, token: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Take one step.

        Args:
            token: (B,) integers, the previous target token.
            state: from :meth:`encode` or the step before; its caches are appended to.
        Returns:
            Logits (B, V) of the next token, and the state.
        """
        if not state.caches:
            caches = make_caches(self.decoder, len(token), self.max_length, state.memory)
            state = state._replace(caches=caches)
        return self._decode(token[:, None], state)[:, 0], state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score each next token of a target, given the true ones before it.

        Args:
            source: (B, S) integers, padded.
            target: (B, T) integers: the start token, then all but the last.
        Returns:
            (B, T, V), unnormalised log-probabilities.
        Raises:
            ValueError: another rank, batch sizes that differ, or more positions than max_length.
        """
        state = self.encode(source)
        if isinstance(target, Tensor) and target.dim() == 2 and len(target) != len(source):
            raise mismatch("target", f"batch size {len(source)}, that of source", target)
        return self._decode(target, state)
