"""Recurrent sequence-to-sequence models, with attention and without."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnbook.normalizers import softmax
from attnbook.scores import AdditiveScore, BilinearScore, dot
from attnbook.shapes import check_choice, check_count, check_probability, check_tensor, mismatch

SCORES = ("none", "additive", "dot", "general", "concat")


class RecurrentState(NamedTuple):
    """What a decoder carries from step to step.

    Attributes:
        hidden: (B, W), the recurrent state.
        memory: (B, S, W), one annotation for each source position.
        mask: (B, 1, S) bool, True at real source positions.
        weights: (B, S), the weights of the last step; zeros without attention.
    """

    hidden: Tensor
    memory: Tensor
    mask: Tensor
    weights: Tensor


class RNNSeq2Seq(nn.Module):
    """Encode a source with a bidirectional GRU, decode a target with a GRU.

    ``score`` chooses how the decoder looks back:

    * "additive": {cite}`bahdanau2015`: the previous state queries the annotations, and their mix, the context, enters
      the recurrent step beside the previous token.
    * "dot", "general", "concat": {cite}`luong2015`, global attention: the new state queries the annotations, and the
      context joins it before the output. We leave out input feeding.
    * "none": {cite}`cho2014`: one fixed vector, made of the encoder's last states, enters every step instead.

    The models share everything else, so that they differ in the attention alone. Differs from {cite}`bahdanau2015`: an
    output layer without maxout.

    Args:
        source_vocab: number of source tokens.
        target_vocab: number of target tokens.
        width: W, size of embeddings, states and annotations; even.
        score: one of the above.
        dropout: of embeddings and output, in training.
        pad: the token that fills up sources; it gets no weight.
    Raises:
        ValueError: sizes below 1, an odd width, an unknown score.
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        width: int,
        *,
        score: str = "additive",
        dropout: float = 0.0,
        pad: int = 0,
    ):
        super().__init__()
        check_count("source_vocab", source_vocab)
        check_count("target_vocab", target_vocab)
        if check_count("width", width, least=2) % 2:
            raise mismatch("width", "an even integer", width)
        self.score_name, self.pad, self.width = check_choice("score", score, SCORES), pad, width
        self.source_embedding = nn.Embedding(source_vocab, width)
        self.target_embedding = nn.Embedding(target_vocab, width)
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(width // 2, width)  # first decoder state from the backward encoder's last, eq. in A.2.2
        early = score in ("none", "additive")  # the context enters the recurrent step
        self.decoder = nn.GRU(2 * width if early else width, width, batch_first=True)
        self.combine = nn.Linear(2 * width, width)
        self.output = nn.Linear(width, target_vocab)
        self.dropout = nn.Dropout(check_probability("dropout", dropout))
        if score in ("additive", "concat"):
            self.score = AdditiveScore(width, width, width)
        else:
            self.score = BilinearScore(width, width) if score == "general" else dot

    def encode(self, source: Tensor) -> RecurrentState:
        """Read a source.

        Args:
            source: (B, S) integers; padding behind.
        Returns:
            The state from which decoding starts.
        Raises:
            ValueError: another rank.
        """
        check_tensor("source", source, "B S", dtypes=(torch.int64,))
        mask = source != self.pad
        packed = pack_padded_sequence(
            self.dropout(self.source_embedding(source)),
            mask.sum(1).clamp(min=1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        memory, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=source.shape[1])  # (B, S, W)
        if self.score_name == "none":
            memory = torch.cat([last[0], last[1]], -1)[:, None]  # (B, 1, W): one vector for the whole source
        hidden = torch.tanh(self.bridge(last[1]))
        return RecurrentState(hidden, memory, mask[:, None, :], torch.zeros(source.shape, device=source.device))

    def attend(self, query: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor]:
        """Look back: contexts (B, T, W) and weights (B, T, S) for queries (B, T, W)."""
        if self.score_name == "none":
            batch, steps = query.shape[:2]
            return state.memory.expand(-1, steps, -1), state.weights[:, None].expand(batch, steps, -1)
        weights = softmax(self.score(query, state.memory), mask=state.mask)
        return weights @ state.memory, weights

    def _read_out(self, hidden: Tensor, context: Tensor) -> Tensor:
        return self.output(self.dropout(torch.tanh(self.combine(torch.cat([hidden, context], -1)))))

    def decode_step(self, token: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Take one step.

        Args:
            token: (B,) integers, the previous target token.
            state: from :meth:`encode` or the step before.
        Returns:
            Logits (B, V) of the next token, and the new state.
        """
        embedded = self.dropout(self.target_embedding(token))[:, None]  # (B, 1, W)
        if self.score_name in ("none", "additive"):
            context, weights = self.attend(state.hidden[:, None], state)
            hidden, _ = self.decoder(torch.cat([embedded, context], -1), state.hidden[None])
        else:
            hidden, _ = self.decoder(embedded, state.hidden[None])
            context, weights = self.attend(hidden, state)
        state = state._replace(hidden=hidden[:, 0], weights=weights[:, 0])
        return self._read_out(hidden, context)[:, 0], state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Score each next token of a target, given the true ones before it.

        Args:
            source: (B, S) integers, padded.
            target: (B, T) integers: the start token, then all but the last.
        Returns:
            (B, T, V), unnormalised log-probabilities.
        Raises:
            ValueError: another rank, or batch sizes that differ.
        """
        return self.forward_with_weights(source, target)[0]

    def forward_with_weights(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Score as :meth:`forward` does, and return the weights (B, T, S) too."""
        check_tensor("target", target, "B T", dtypes=(torch.int64,))
        state = self.encode(source)
        if len(target) != len(source):
            raise mismatch("target", f"batch size {len(source)}, that of source", target)
        if self.score_name == "additive":  # each context depends on the step before: no way around the loop
            logits, weights = [], []
            for token in target.unbind(1):
                step, state = self.decode_step(token, state)
                logits.append(step)
                weights.append(state.weights)
            return torch.stack(logits, 1), torch.stack(weights, 1)
        embedded = self.dropout(self.target_embedding(target))
        if self.score_name == "none":
            context, weights = self.attend(embedded, state)
            hidden, _ = self.decoder(torch.cat([embedded, context], -1), state.hidden[None])
        else:
            hidden, _ = self.decoder(embedded, state.hidden[None])
            context, weights = self.attend(hidden, state)
        return self._read_out(hidden, context), weights
