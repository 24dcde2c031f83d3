"""Listen, Attend and Spell: recurrent speech recognition with attention; and the baseline that aligns without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnbook.masks import padding
from attnbook.models.count import linear, lstm, network
from attnbook.normalizers import softmax
from attnbook.scores import AdditiveScore, dot
from attnbook.shapes import check_count, check_probability, check_tensor, mismatch, tensor_shape


@dataclass(frozen=True)
class ListenerConfig:
    """The shape of a :class:`ListenAttendSpell` and of a :class:`CTCRecogniser`.

    Attributes:
        channels: of the spectrogram.
        vocab_size: V, characters.
        width: W, of the annotations and of the speller's state; even.
        pyramid: layers of the listener that halve the number of frames.
        location_filters: of the convolution over the last weights; 0 for attention by content alone.
        location_kernel: positions that one such filter sees; odd.
        dropout: of annotations and embeddings, in training.
    """

    channels: int
    vocab_size: int
    width: int
    pyramid: int = 3
    location_filters: int = 0
    location_kernel: int = 31
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channels", "vocab_size", "location_kernel"):
            check_count(name, getattr(self, name))
        if check_count("width", self.width, least=2) % 2:
            raise mismatch("width", "an even integer", self.width)
        if self.location_kernel % 2 == 0:
            raise mismatch("location_kernel", "an odd integer", self.location_kernel)
        for name in ("pyramid", "location_filters"):
            check_count(name, getattr(self, name), least=0)
        check_probability("dropout", self.dropout)

    def num_parameters(self, *, attention: bool = True) -> int:
        """Count the parameters by formula.

        Args:
            attention: of the whole Listen, Attend and Spell; without it, of the CTC recogniser.
        """
        V, W = self.vocab_size, self.width
        listener = lstm(self.channels, W // 2, directions=2) + self.pyramid * lstm(2 * W, W // 2, directions=2)
        if not attention:
            return listener + linear(W, V + 1)
        speller = V * W + lstm(2 * W, W) + lstm(W, W) + network([2 * W, W, V])
        if self.location_filters:
            look = W * W + W * (W + self.location_filters) + W + self.location_filters * self.location_kernel
        else:
            look = 2 * linear(W, W)
        return listener + speller + look


class Listener(nn.Module):
    """Read a spectrogram by a pyramid of bidirectional LSTMs ({cite}`chan2015`, §3.1).

    Each layer above the first reads the annotations of the one below two by two, side by side, so that there are half
    as many; where their number is odd the last is dropped.

    Args:
        config: its shape.
    """

    def __init__(self, config: ListenerConfig):
        super().__init__()
        self.channels, half = config.channels, config.width // 2
        inputs = [config.channels, *[2 * config.width] * config.pyramid]
        self.layers = nn.ModuleList(nn.LSTM(n, half, batch_first=True, bidirectional=True) for n in inputs)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, spectrogram: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Listen.

        Args:
            spectrogram: (B, channels, frames); padding behind.
            lengths: (B,) integers, the real frames of each; all of them by default.
        Returns:
            Annotations (B, T, W), zeros behind the real ones, and their numbers (B,).
        Raises:
            ValueError: shapes that do not match, a recording too short for the pyramid.
        """
        check_tensor("spectrogram", spectrogram, "B channels frames")
        batch, channels, frames = spectrogram.shape
        if channels != self.channels:
            raise mismatch("spectrogram", f"{self.channels} channels on axis 1", spectrogram)
        least = 2 ** (len(self.layers) - 1)
        if frames < least:
            raise mismatch("spectrogram", f"at least {least} frames on axis 2", spectrogram)
        if lengths is None:
            lengths = torch.full((batch,), frames)
        if check_tensor("lengths", lengths, "B", dtypes=(torch.int64, torch.int32)).shape != (batch,):
            raise mismatch("lengths", f"shape ({batch},)", tensor_shape(lengths))
        if lengths.min() < least or lengths.max() > frames:
            raise mismatch("lengths", f"between {least} and {frames} frames", f"{lengths.min()} to {lengths.max()}")
        x, lengths = spectrogram.transpose(1, 2), lengths.cpu()
        for i, layer in enumerate(self.layers):
            if i:
                lengths = lengths // 2
                x = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).flatten(2)  # (B, T, W) → (B, T/2, 2W)
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])
            x = self.dropout(x)
        return x, lengths.to(x.device)


class SpellerState(NamedTuple):
    """What spelling carries from step to step.

    Attributes:
        memory: (B, T, W), the annotations.
        mask: (B, 1, T) bool, True at real ones.
        hidden: states of the speller's layers, (2, B, W).
        cell: their cells, likewise.
        context: (B, W), the last mix of annotations.
        weights: (B, T), the last weights.
    """

    memory: Tensor
    mask: Tensor
    hidden: Tensor
    cell: Tensor
    context: Tensor
    weights: Tensor


class ListenAttendSpell(nn.Module):
    """Write down what is said, letter by letter, looking back at the sound for each ({cite}`chan2015`).

    The speller's state, after it has taken in the last letter and the last context, attends to the annotations; state
    and new context give the next letter. With ``location_filters`` the attention also sees where it looked last: a
    convolution of the last weights enters an additive score ({cite}`chorowski2015`). Differs from the
    papers: queries and keys are made by one linear map each, where {cite}`chan2015` has small networks; and
    {cite}`chorowski2015` queries with the state before the step, ours with the one after it.

    Args:
        config: its shape.
    """

    def __init__(self, config: ListenerConfig):
        super().__init__()
        self.config = config
        V, W, filters = config.vocab_size, config.width, config.location_filters
        self.listener = Listener(config)
        self.embedding = nn.Embedding(V, W)
        self.speller = nn.LSTM(2 * W, W, 1, batch_first=True)
        self.speller_top = nn.LSTM(W, W, 1, batch_first=True)
        if filters:
            kernel = config.location_kernel
            self.location = nn.Conv1d(1, filters, kernel, padding=kernel // 2, bias=False)
            self.score = AdditiveScore(W, W + filters, W)
        else:
            self.query, self.key = nn.Linear(W, W), nn.Linear(W, W)
        self.output = nn.Sequential(nn.Linear(2 * W, W), nn.Tanh(), nn.Linear(W, V))
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, spectrogram: Tensor, lengths: Tensor | None = None) -> SpellerState:
        """Listen, and return the state from which spelling starts.

        Args:
            spectrogram: (B, channels, frames); padding behind.
            lengths: (B,) integers, the real frames of each; all of them by default.
        """
        memory, lengths = self.listener(spectrogram, lengths)
        mask = padding(lengths, memory.shape[1])[:, 0]  # (B, 1, T)
        batch, _, width = memory.shape
        first = mask[:, 0] / lengths[:, None]  # even weights, before anything has been looked at
        zeros = memory.new_zeros(2, batch, width)
        return SpellerState(memory, mask, zeros, zeros, memory.new_zeros(batch, width), first.to(memory))

    def attend(self, hidden: Tensor, state: SpellerState) -> tuple[Tensor, Tensor]:
        """Look back: a context (B, W) and weights (B, T) for a state (B, W)."""
        if self.config.location_filters:
            seen = self.location(state.weights[:, None]).transpose(1, 2)  # (B, T, filters)
            scores = self.score(hidden[:, None], torch.cat([state.memory, seen], -1))
        else:
            scores = dot(self.query(hidden)[:, None], self.key(state.memory)) * self.config.width**-0.5
        weights = softmax(scores, mask=state.mask)  # (B, 1, T)
        return (weights @ state.memory)[:, 0], weights[:, 0]

    def decode_step(self, token: Tensor, state: SpellerState) -> tuple[Tensor, SpellerState]:
        """Take one step.

        Args:
            token: (B,) integers, the previous letter.
            state: from :meth:`encode` or the step before.
        Returns:
            Logits (B, V) of the next letter, and the new state.
        """
        x = torch.cat([self.dropout(self.embedding(token)), state.context], -1)[:, None]
        hidden, cell = [], []
        for i, layer in enumerate((self.speller, self.speller_top)):
            x, (h, c) = layer(x, (state.hidden[i : i + 1], state.cell[i : i + 1]))
            hidden.append(h)
            cell.append(c)
        context, weights = self.attend(x[:, 0], state)
        logits = self.output(torch.cat([x[:, 0], context], -1))
        state = state._replace(hidden=torch.cat(hidden), cell=torch.cat(cell), context=context, weights=weights)
        return logits, state

    def forward(self, spectrogram: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Score each next letter of a text, given the recording and the true letters before it.

        Args:
            spectrogram: (B, channels, frames); padding behind.
            target: (B, L) integers: the start token, then all letters but the last.
            lengths: (B,) integers, the real frames of each; all of them by default.
        Returns:
            (B, L, V), unnormalised log-probabilities.
        Raises:
            ValueError: shapes that do not match.
        """
        return self.forward_with_weights(spectrogram, target, lengths)[0]

    def forward_with_weights(
        self, spectrogram: Tensor, target: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score as :meth:`forward` does, and return the weights (B, L, T) too."""
        check_tensor("target", target, "B L", dtypes=(torch.int64, torch.int32))
        state = self.encode(spectrogram, lengths)
        if len(target) != len(spectrogram):
            raise mismatch("target", f"batch size {len(spectrogram)}, that of spectrogram", target)
        logits, weights = [], []
        for token in target.unbind(1):
            step, state = self.decode_step(token, state)
            logits.append(step)
            weights.append(state.weights)
        return torch.stack(logits, 1), torch.stack(weights, 1)


class CTCRecogniser(nn.Module):
    """Label each frame with a letter or a blank, and sum over all ways to read the text off ({cite}`graves2006`).

    The same listener, without attention: the alignment is monotonic by construction, and the letters are independent
    of each other given the sound. Token V is the blank.

    Args:
        config: its shape; those of attention are not used.
    """

    def __init__(self, config: ListenerConfig):
        super().__init__()
        self.config = config
        self.listener = Listener(config)
        self.output = nn.Linear(config.width, config.vocab_size + 1)

    def forward(self, spectrogram: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score letters and the blank at each annotation.

        Args:
            spectrogram: (B, channels, frames); padding behind.
            lengths: (B,) integers, the real frames of each; all of them by default.
        Returns:
            Log-probabilities (B, T, V + 1), and the numbers (B,) of real annotations.
        """
        memory, lengths = self.listener(spectrogram, lengths)
        return self.output(memory).log_softmax(-1), lengths

    def loss(
        self, spectrogram: Tensor, target: Tensor, target_lengths: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Return the negative log-likelihood of texts, in nats a letter.

        Args:
            spectrogram: (B, channels, frames); padding behind.
            target: (B, L) integers below V; padding behind.
            target_lengths: (B,) integers, the letters of each text.
            lengths: (B,) integers, the real frames of each; all of them by default.
        Returns:
            Scalar; infinite where a text has more letters than the listener leaves annotations.
        """
        scores, heard = self(spectrogram, lengths)
        blank = self.config.vocab_size
        return nn.functional.ctc_loss(scores.transpose(0, 1), target, heard, target_lengths, blank=blank)

    @torch.no_grad()
    def transcribe(self, spectrogram: Tensor, lengths: Tensor | None = None) -> list[list[int]]:
        """Read the most probable label at each annotation, merge repetitions, drop blanks.

        Args:
            spectrogram: (B, channels, frames); padding behind.
            lengths: (B,) integers, the real frames of each; all of them by default.
        Returns:
            The letters of each recording.
        """
        scores, heard = self(spectrogram, lengths)
        texts = []
        for labels, count in zip(scores.argmax(-1), heard, strict=True):
            merged = labels[:count].unique_consecutive()
            texts.append(merged[merged != self.config.vocab_size].tolist())
        return texts
