"""Text about an image: a language model that attends to what an image encoder saw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbook.cache import StaticCache
from attnbook.layers import CrossBlock, FeedForward, MultiHeadAttention, TransformerBlock
from attnbook.models.decoder import Decoder
from attnbook.models.vision import VisionTransformer
from attnbook.shapes import check_count, check_tensor, mismatch, tensor_shape


class GatedBlock(nn.Module):
    """A language model's block with a gated reading of a memory before it ({cite}`alayrac2022`, Figure 4).

    Args:
        block: the language model's.
        reading: what stands before it; None for nothing.
    """

    def __init__(self, block: TransformerBlock, reading: CrossBlock | None):
        super().__init__()
        self.block, self.reading = block, reading

    @property
    def attention(self) -> MultiHeadAttention:
        """The block's self-attention, for which caches are made."""
        return self.block.attention

    @property
    def feed_forward(self) -> FeedForward:
        """The block's feed-forward network."""
        return self.block.feed_forward

    @property
    def cross(self) -> None:
        """The block has no cross-attention of its own."""
        return self.block.cross

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        need_weights: bool = False,
        **options: Any,
    ) -> Any:
        """Update the residual stream.

        Args:
            x: (B, L, E).
            memory: (B, S, memory_width).
            memory_mask: broadcastable to (B, H, L, S), bool; True = may attend.
            need_weights: return the weights of both attentions too.
            options: passed on to the block.
        Returns:
            As :meth:`attnbook.layers.TransformerBlock.forward`.
        """
        seen = None
        if self.reading is not None:
            x = self.reading(x, memory, memory_mask=memory_mask, need_weights=need_weights)
            x, seen = x if need_weights else (x, None)
        made = self.block(x, need_weights=need_weights, **options)
        return (made[0], made[1], seen) if need_weights else made


class Given(nn.Module):
    """A captioner with its images fixed: a language model that :func:`attnbook.models.generation.generate` can decode.

    Args:
        text: the captioner's Decoder.
        memory: (B, S, memory_width), what it saw.
    """

    def __init__(self, text: Decoder, memory: Tensor):
        super().__init__()
        self.text, self.memory, self.config = text, memory, text.config

    def make_cache(self, batch_size: int, max_length: int | None = None) -> list[StaticCache]:
        """Set memory aside for decoding; as for :class:`attnbook.models.decoder.Decoder`."""
        return self.text.make_cache(batch_size, max_length)

    def forward(self, tokens: Tensor, caches: list[StaticCache] | None = None) -> Tensor:
        """Score the token that follows each position; as for :class:`attnbook.models.decoder.Decoder`."""
        return self.text(tokens, caches, memory=self.memory)


class Captioner(nn.Module):
    """Describe an image: the patches' vectors are the memory of a Decoder's cross-attention ({cite}`xu2015` in kind).

    Two ways to attend to them. The Decoder may have cross-attention in each of its blocks (``memory_width``), learned
    with the rest. Or, ``gated``, it has none, may have been trained on text alone and frozen, and new blocks that read
    the image are put before its own, each behind a gate that is closed at first ({cite}`alayrac2022`, §2.2): a fresh
    gated captioner is the language model that it was made from. Differs from that paper: one image a text.

    Args:
        image: makes the vectors.
        text: the language model; if ``gated``, its blocks are wrapped in place.
        gated: put gated reading before its blocks.
        every: before which of them: the first and each ``every``-th after it.
        resampler: turns the image's vectors into fewer: a :class:`attnbook.models.perceiver.Perceiver` without
            queries, say.
    Raises:
        ValueError: a Decoder with a memory of another width, or with one where ``gated``.
    """

    def __init__(
        self,
        image: VisionTransformer,
        text: Decoder,
        *,
        gated: bool = False,
        every: int = 1,
        resampler: nn.Module | None = None,
    ):
        super().__init__()
        self.image, self.text, self.resampler = image, text, resampler
        config = text.config
        memory_width = (image if resampler is None else resampler).config.width
        wanted = None if gated else memory_width
        if config.memory_width != wanted:
            raise mismatch("text", f"a Decoder with memory_width={wanted}", f"memory_width={config.memory_width}")
        check_count("every", every)
        self.gated, self.every = gated, every
        if gated:
            for i, block in enumerate(text.blocks):
                reading = None
                if i % every == 0:
                    options = {"memory_width": memory_width, "hidden": config.hidden, "dropout": config.dropout}
                    reading = CrossBlock(config.width, config.num_heads, gated=True, **options)
                text.blocks[i] = GatedBlock(block, reading)

    def num_parameters(self) -> int:
        """Count the parameters by formula, those of the resampler excepted where it has no formula."""
        config = self.text.config
        count = self.image.config.num_parameters() + config.num_parameters()
        if self.resampler is not None:
            count += self.resampler.config.num_parameters()
        if self.gated:
            E, M = config.width, (self.image if self.resampler is None else self.resampler).config.width
            hidden = config.hidden or 4 * E
            reading = 2 * E * E + 2 * M * E + 4 * E + 2 * E * hidden + hidden + E + 4 * E + 2 * M + 2
            count += -(-config.depth // self.every) * reading
        return count

    def look(self, image: Tensor) -> Tensor:
        """Turn images into the memory that the text attends to.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            (B, S, memory_width).
        Raises:
            ValueError: another number of channels, or another size.
        """
        seen = self.image.features(image)
        return seen if self.resampler is None else self.resampler(seen)

    def forward(self, image: Tensor, tokens: Tensor, *, return_trace: bool = False) -> Any:
        """Score each next token of a text, given the image and the true tokens before it.

        Args:
            image: (B, channels, rows, columns).
            tokens: (B, L) integers: the start token, then all but the last; for a question, the question first.
            return_trace: return what every block of the text did, too.
        Returns:
            (B, L, V), unnormalised log-probabilities; with return_trace also a :class:`attnbook.layers.Trace`, whose
            cross_weights (B, H, L, S) say where each word looked.
        Raises:
            ValueError: shapes that do not match.
        """
        check_same_batch(image, tokens)
        return self.text(tokens, memory=self.look(image), return_trace=return_trace)

    def given(self, image: Tensor) -> Given:
        """Fix the images, for :func:`attnbook.models.generation.generate`.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            A model of the text alone.
        """
        return Given(self.text, self.look(image))


def check_same_batch(image: Tensor, tokens: Tensor) -> None:
    """Check that there is a text for each image.

    Args:
        image: (B, channels, rows, columns).
        tokens: (B, L).
    Raises:
        ValueError: another rank, or batch sizes that differ.
    """
    check_tensor("image", image, "B channels rows columns")
    check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
    if len(tokens) != len(image):
        raise mismatch("tokens", f"batch size {len(image)}, that of image", tokens)


class VisualQuestions(nn.Module):
    """Answer questions about images by choosing among frequent answers ({cite}`antol2015`).

    The question is read by a captioner's language model, which attends to the image; the vector of the last real word
    is classified. Differs from the paper: cross-attention, where it multiplies one vector of each side. To generate
    answers instead, give a :class:`Captioner` the question as the beginning of its text.

    Args:
        captioner: reads.
        num_answers: A.
    Raises:
        ValueError: num_answers below 1.
    """

    def __init__(self, captioner: Captioner, num_answers: int):
        super().__init__()
        self.captioner = captioner
        self.head = nn.Linear(captioner.text.config.width, check_count("num_answers", num_answers))

    def num_parameters(self) -> int:
        """Count the parameters by formula; the language model's untied output projection, unused, included."""
        return self.captioner.num_parameters() + (self.head.in_features + 1) * self.head.out_features

    def forward(self, image: Tensor, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Score the answers.

        Args:
            image: (B, channels, rows, columns).
            tokens: (B, L) integers: the question; padding behind.
            mask: (B, L) bool, True at real tokens; all of them by default.
        Returns:
            (B, A), unnormalised log-probabilities.
        Raises:
            ValueError: shapes that do not match, a row of the mask without a real token.
        """
        check_same_batch(image, tokens)
        states = self.captioner.text.states(tokens, memory=self.captioner.look(image))
        if mask is None:
            return self.head(states[:, -1])
        if check_tensor("mask", mask, "B L", dtypes=(torch.bool,)).shape != tokens.shape:
            raise mismatch("mask", f"shape {tuple(tokens.shape)}, that of tokens", tensor_shape(mask))
        if not mask.any(1).all():
            raise mismatch("mask", "a real token in every row", "a row without")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * mask).argmax(1)
        return self.head(states[torch.arange(len(tokens), device=tokens.device), last])
