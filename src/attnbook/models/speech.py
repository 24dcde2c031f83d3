"""Speech to text with an encoder–decoder Transformer over a spectrogram: Whisper's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbook.cache import StaticCache
from attnbook.layers import TransformerBlock, make_caches, make_norm, run_blocks
from attnbook.shapes import check_count, check_tensor, mismatch


@dataclass(frozen=True)
class SpeechConfig:
    """The shape of a :class:`SpeechTransformer`.

    Attributes:
        vocab_size: V, text tokens.
        channels: of the spectrogram, 80 in Whisper's first models.
        frames: frames of a whole recording after the convolutions, 1,500 for 30 s.
        context_length: the most text positions.
        width: E.
        depth: blocks of the encoder, and of the decoder.
        num_heads: H.
        hidden: width of the feed-forward networks; 4E by default.
        dropout: of the weights and what each part adds.
    """

    vocab_size: int
    channels: int
    frames: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "channels", "frames", "context_length", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))

    def num_parameters(self) -> int:
        """Count the parameters by formula; every projection has a bias, the output is tied to the embedding."""
        E, hidden = self.width, self.hidden or 4 * self.width
        attention = 4 * (E * E + E)
        feed_forward = 2 * E * hidden + hidden + E
        norm = 2 * E
        convolutions = 3 * self.channels * E + E + 3 * E * E + E
        encoder = self.depth * (attention + feed_forward + 2 * norm) + norm + convolutions + self.frames * E
        decoder = self.depth * (2 * attention + feed_forward + 3 * norm) + norm
        return encoder + decoder + (self.vocab_size + self.context_length) * E


class SpeechState(NamedTuple):
    """What decoding carries from step to step.

    Attributes:
        memory: (B, T, E), the encoder's output.
        caches: of the decoder's self-attention, one for each block.
    """

    memory: Tensor
    caches: list[StaticCache]


class SpeechTransformer(nn.Module):
    """Write down what is said: two convolutions, an encoder, a decoder ({cite}`radford2023`, §2.2).

    Differs from the published model in two ways that change no output: its keys' projections have no bias, while ours
    have one (softmax does not see it: it adds the same to all scores of a query); its encoder's positions are a fixed
    table of sinusoids, ours a parameter that a loader may fill with it.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config = config
        E = config.width
        options = {"hidden": config.hidden, "dropout": config.dropout}
        self.conv1 = nn.Conv1d(config.channels, E, 3, padding=1)
        self.conv2 = nn.Conv1d(E, E, 3, stride=2, padding=1)
        self.source_position = nn.Parameter(torch.empty(config.frames, E))
        self.encoder = nn.ModuleList(TransformerBlock(E, config.num_heads, **options) for _ in range(config.depth))
        self.encoder_norm = make_norm("layer", E)
        self.embedding = nn.Embedding(config.vocab_size, E)
        self.position = nn.Parameter(torch.empty(config.context_length, E))
        self.decoder = nn.ModuleList(
            TransformerBlock(E, config.num_heads, cross_attention=True, **options) for _ in range(config.depth)
        )
        self.decoder_norm = make_norm("layer", E)
        for table in (self.source_position, self.position, self.embedding.weight):
            nn.init.normal_(table, std=0.02)

    def _listen(self, spectrogram: Tensor) -> Tensor:
        check_tensor("spectrogram", spectrogram, "B channels frames")
        config = self.config
        if spectrogram.shape[1] != config.channels:
            raise mismatch("spectrogram", f"{config.channels} channels on axis 1", spectrogram)
        x = nn.functional.gelu(self.conv1(spectrogram))
        x = nn.functional.gelu(self.conv2(x)).transpose(1, 2)  # (B, T, E): half as many frames
        if x.shape[1] > config.frames:
            raise mismatch("spectrogram", f"at most {2 * config.frames} frames", spectrogram)
        return x + self.source_position[: x.shape[1]]

    def encode(self, spectrogram: Tensor, *, return_trace: bool = False) -> Any:
        """Listen.

        Args:
            spectrogram: (B, channels, frames), at most twice the configuration's frames.
            return_trace: return what every block did, too.
        Returns:
            (B, T, E), one vector for two frames; with return_trace also a :class:`attnbook.layers.Trace`.
        Raises:
            ValueError: another shape.
        """
        x = self._listen(spectrogram)
        if return_trace:
            x, trace = run_blocks(self.encoder, x)
            return self.encoder_norm(x), trace
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def start(self, spectrogram: Tensor) -> SpeechState:
        """Encode a recording and set aside the memory for decoding.

        Args:
            spectrogram: (B, channels, frames).
        """
        memory = self.encode(spectrogram)
        caches = make_caches(self.decoder, len(memory), self.config.context_length, memory)
        return SpeechState(memory, caches)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        *,
        caches: list[StaticCache] | None = None,
        return_trace: bool = False,
    ) -> Any:
        """Score the token that follows each position of a text.

        Args:
            tokens: (B, L) integers below V.
            memory: (B, T, E), from :meth:`encode`.
            caches: of a :class:`SpeechState`; the tokens are taken to follow those that they hold.
            return_trace: return what every block did, too.
        Returns:
            (B, L, V), unnormalised log-probabilities; with return_trace also a :class:`attnbook.layers.Trace`.
        Raises:
            ValueError: another rank, or more positions than the context length.
        """
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise mismatch("tokens", f"at most {self.config.context_length - start} more positions", f"{end - start}")
        x = self.embedding(tokens) + self.position[start:end]
        trace = None
        if return_trace:
            x, trace = run_blocks(self.decoder, x, caches=caches, memory=memory, is_causal=True)
        else:
            for i, block in enumerate(self.decoder):
                x = block(x, memory=memory, is_causal=True, cache=caches[i] if caches else None)
        logits = self.decoder_norm(x) @ self.embedding.weight.T
        return (logits, trace) if return_trace else logits

    def forward(self, spectrogram: Tensor, tokens: Tensor) -> Tensor:
        """Score each next token of a text, given the recording and the true tokens before it."""
        return self.decode(tokens, self.encode(spectrogram))
