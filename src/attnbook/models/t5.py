"""Text to text: T5's encoder–decoder, with one bias of relative positions for all layers of a stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.layers import ACTIVATIONS, GATED, TransformerBlock, make_caches, make_norm, run_blocks
from attnbook.models.transformer import TransformerState
from attnbook.positions import T5RelativeBias
from attnbook.shapes import check_choice, check_count, check_tensor, mismatch


@dataclass(frozen=True)
class T5Config:
    """The shape of a :class:`T5`. The defaults are the paper's manner; see :meth:`version_1_1` for the later one.

    Attributes:
        vocab_size: V.
        width: E.
        depth: blocks of the encoder, and of the decoder.
        num_heads: H.
        head_dim: D, free of the width; E / H by default.
        hidden: width of the feed-forward networks; 4E by default.
        num_buckets: of relative positions.
        max_distance: distances from it on share the last bucket.
        activation: as for :class:`attnbook.layers.FeedForward`.
        tie: use the embedding as the output projection too, on states scaled by 1/√E.
        norm_eps: what the norms add to the mean square.
        dropout: of the embeddings, the weights, what each part adds, and the outputs of both stacks.
        max_length: the most tokens to decode; sets the caches' size, not a limit of the model.
        pad: the token that fills up sources, and starts a target.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    head_dim: int | None = None
    hidden: int | None = None
    num_buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    tie: bool = True
    norm_eps: float = 1e-6
    dropout: float = 0.0
    max_length: int = 512
    pad: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "num_heads", "max_length"):
            check_count(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.head_dim is None and self.width % self.num_heads:
            raise mismatch("num_heads", f"a divisor of width = {self.width}", self.num_heads)

    @classmethod
    def version_1_1(cls, vocab_size: int, width: int, depth: int, num_heads: int, **changes) -> T5Config:
        """Return a configuration in the manner of T5 1.1: gated GELU, an output projection of its own."""
        return cls(vocab_size, width, depth, num_heads, **{"activation": "geglu", "tie": False, **changes})

    def num_parameters(self) -> int:
        """Count the parameters by formula; nothing has a bias."""
        E, hidden = self.width, self.hidden or 4 * self.width
        attention = 4 * E * self.num_heads * (self.head_dim or E // self.num_heads)
        feed_forward = (3 if self.activation in GATED else 2) * E * hidden
        encoder = self.depth * (attention + feed_forward + 2 * E) + E
        decoder = self.depth * (2 * attention + feed_forward + 3 * E) + E
        tables = 2 * self.num_buckets * self.num_heads
        return encoder + decoder + tables + self.vocab_size * E * (1 if self.tie else 2)


class T5(nn.Module):
    """Turn one text into another; every task is a task of this kind ({cite}`raffel2020`).

    Scores are not scaled: the first weights of the queries are smaller by √D instead. Positions are known only by a
    bias that depends on the distance; each stack has one table, which all its layers share, and cross-attention has
    none. Norms are RMSNorm, before each part, and nothing has a bias (their §2.1).

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        E = config.width
        self.embedding = nn.Embedding(config.vocab_size, E)
        attention = {"head_dim": config.head_dim, "scale": 1.0}
        options = {"hidden": config.hidden, "activation": config.activation, "dropout": config.dropout}
        options |= {"norm": "rms", "norm_eps": config.norm_eps, "bias": False, **attention}
        self.encoder = nn.ModuleList(TransformerBlock(E, config.num_heads, **options) for _ in range(config.depth))
        self.decoder = nn.ModuleList(
            TransformerBlock(E, config.num_heads, cross_attention=True, cross_options=attention, **options)
            for _ in range(config.depth)
        )
        buckets = {"num_buckets": config.num_buckets, "max_distance": config.max_distance}
        self.encoder_bias = T5RelativeBias(config.num_heads, bidirectional=True, **buckets)
        self.decoder_bias = T5RelativeBias(config.num_heads, bidirectional=False, **buckets)
        self.encoder_norm = make_norm("rms", E, config.norm_eps)
        self.decoder_norm = make_norm("rms", E, config.norm_eps)
        self.output = nn.Linear(E, config.vocab_size, bias=False)
        if config.tie:
            self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as the authors' code does: by the number of inputs, queries smaller by √D."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in (*self.encoder, *self.decoder):
            for part in (block.attention, block.cross):
                if part is not None:
                    nn.init.normal_(part.q_proj.weight, std=(self.config.width * part.head_dim) ** -0.5)
        for bias in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(bias.table, std=self.config.width**-0.5)
        nn.init.normal_(self.output.weight)
        nn.init.normal_(self.embedding.weight)

    def _embed(self, name: str, tokens: Tensor) -> Tensor:
        check_tensor(name, tokens, "B L", dtypes=(torch.int64, torch.int32))
        return self.dropout(self.embedding(tokens))

    def encode(self, source: Tensor, *, return_trace: bool = False) -> Any:
        """Read a source.

        Args:
            source: (B, S) integers below V; padding behind.
            return_trace: return what every block did, too.
        Returns:
            The state from which decoding starts; with return_trace also a :class:`attnbook.layers.Trace`.
        Raises:
            ValueError: another rank.
        """
        x = self._embed("source", source)
        mask = (source != self.config.pad)[:, None, None, :]
        options = {"attn_mask": mask, "score_bias": self.encoder_bias(source.shape[1])}
        trace = None
        if return_trace:
            x, trace = run_blocks(self.encoder, x, **options)
        else:
            for block in self.encoder:
                x = block(x, **options)
        state = TransformerState(self.dropout(self.encoder_norm(x)), mask, [])
        return (state, trace) if return_trace else state

    def decode(self, target: Tensor, state: TransformerState, *, return_trace: bool = False) -> Any:
        """Score the token that follows each position of a target.

        Args:
            target: (B, T) integers; with caches in the state, taken to follow those that they hold.
            state: from :meth:`encode`.
            return_trace: return what every block did, too.
        Returns:
            (B, T, V), unnormalised log-probabilities; with return_trace also a :class:`attnbook.layers.Trace`.
        Raises:
            ValueError: another rank or batch size, or more positions than the caches have room for.
        """
        x = self._embed("target", target)
        if len(target) != len(state.memory):
            raise mismatch("target", f"batch size {len(state.memory)}, that of source", target)
        start = state.caches[0].length if state.caches else 0
        options = {"memory": state.memory, "memory_mask": state.mask, "is_causal": True}
        options["score_bias"] = self.decoder_bias(target.shape[1], start + target.shape[1])
        trace = None
        if return_trace:
            x, trace = run_blocks(self.decoder, x, caches=state.caches, **options)
        else:
            for i, block in enumerate(self.decoder):
                x = block(x, cache=state.caches[i] if state.caches else None, **options)
        x = self.dropout(self.decoder_norm(x))
        logits = self.output(x * self.config.width**-0.5 if self.config.tie else x)
        return (logits, trace) if return_trace else logits

    def decode_step(self, token: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Take one step.

        Args:
            token: (B,) integers, the previous target token; ``pad`` to begin with.
            state: from :meth:`encode` or the step before; its caches are appended to.
        Returns:
            Logits (B, V) of the next token, and the state.
        """
        if not state.caches:
            caches = make_caches(self.decoder, len(token), self.config.max_length, state.memory)
            state = state._replace(caches=caches)
        return self.decode(token[:, None], state)[:, 0], state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score each next token of a target, given the true ones before it.

        Args:
            source: (B, S) integers, padded.
            target: (B, T) integers: ``pad``, then all but the last.
        Returns:
            (B, T, V), unnormalised log-probabilities.
        Raises:
            ValueError: another rank, or batch sizes that differ.
        """
        return self.decode(target, self.encode(source))
