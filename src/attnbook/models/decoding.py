"""The lean way to decode: a decoder's weights laid out for one new token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbook.cache import Cache
from attnbook.layers import TransformerBlock
from attnbook.models.decoder import Decoder
from attnbook.models.generation import evaluation
from attnbook.shapes import mismatch


class _Block(NamedTuple):
    """A block's matrices, input axis first, those that read the same vector side by side.

    Attributes:
        norms: (gain, bias) of the norm before attention and of the one before the feed-forward network.
        qkv: (E, (H + 2·Hkv)·D), and its bias.
        out: (H·D, E), and its bias.
        up: (E, hidden), with the gate's columns before them where there is a gate, and its bias.
        down: (hidden, E), and its bias.
    """

    norms: tuple[tuple[Tensor, Tensor | None], ...]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


def _merge(*linears: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    """Put projections of one input side by side: (E, widths together), and the biases, or zeros.

    A product with one row reads a matrix fastest along its longer axis: this one is stored contiguously.
    """
    weight = torch.cat([linear.weight for linear in linears])
    biases = [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
    weight = weight.t()
    return weight if weight.shape[0] > weight.shape[1] else weight.contiguous(), torch.cat(biases)


def _lay_out(block: TransformerBlock) -> _Block:
    attention, network = block.attention, block.feed_forward
    rises = [network.up] if network.gate is None else [network.gate, network.up]
    return _Block(
        tuple((norm.weight, getattr(norm, "bias", None)) for norm in (block.attention_norm, block.feed_forward_norm)),
        _merge(attention.q_proj, attention.k_proj, attention.v_proj),
        _merge(attention.out_proj),
        _merge(*rises),
        _merge(network.down),
    )


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Keep oneDNN out: on a single vector its GELU takes three times as long as PyTorch's own."""
    before = torch.backends.mkldnn.set_flags(False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before, _fp32_precision=None)


class Decoding:
    """A trained :class:`~attnbook.models.decoder.Decoder`, ready to produce text quickly.

    Computes what the model computes, and takes its place in :func:`~attnbook.models.generation.generate`. A single new
    token, whose time goes to reading the weights once, takes a path of its own: queries, keys and values come from one
    product, keys and values are written where they stay, and nothing is checked that the first call has checked. Longer
    inputs, prompts above all, go through the model itself.

    The weights are copied: train the model further, and make this anew.

    Args:
        model: whose weights to copy; its own are left as they are.
    Raises:
        ValueError: no Decoder, or one whose attention is not softmax.
    """

    def __init__(self, model: Decoder):
        if not isinstance(model, Decoder):
            raise mismatch("model", "a Decoder", model)
        if any(block.attention.normalizer != "softmax" for block in model.blocks):
            raise mismatch("model", "a Decoder whose attention is softmax", "another normalizer")
        self.model, self.config, self.make_cache = model, model.config, model.make_cache
        with torch.inference_mode():
            self.blocks = [_lay_out(block) for block in model.blocks]
            self.output = model.output.weight.t().contiguous()
        attention = model.blocks[0].attention
        self.rotary = attention.rotary
        self.heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.eps = model.norm.eps  # None has RMSNorm take the type's own

    def _norm(self, x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        if self.config.norm == "layer":
            return F.layer_norm(x, gain.shape, gain, bias, self.eps)
        return F.rms_norm(x, gain.shape, gain, self.eps)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, caches: list[Cache], *, padding: Tensor | None = None) -> Tensor:
        """Score the token that follows each position, as the model does in evaluation mode.

        Args:
            tokens: (B, L) integers below V.
            caches: from :meth:`make_cache`; the tokens are taken to follow those that it holds.
            padding: as for :meth:`attnbook.models.decoder.Decoder.forward`.
        Returns:
            (B, L, V), unnormalised log-probabilities.
        """
        if tokens.shape[1] > 1:
            with evaluation(self.model):
                return self.model(tokens, caches, padding=padding)
        with _without_onednn():
            return self._step(tokens, caches, padding)[:, None]

    def _step(self, tokens: Tensor, caches: list[Cache], padding: Tensor | None) -> Tensor:
        """Take one token of each sequence, (B, 1), and score the next, (B, V)."""
        (H, Hkv, D), B = self.heads, len(tokens)
        x, mask = self.model.embed(tokens, caches, padding)
        x = x.view(B, -1)  # (B, E)
        start = torch.tensor([caches[0].length]) if self.rotary is not None else None
        for block, cache in zip(self.blocks, caches, strict=True):
            qkv = torch.addmm(block.qkv[1], self._norm(x, *block.norms[0]), block.qkv[0]).view(B, H + 2 * Hkv, 1, D)
            qk, v = qkv[:, : H + Hkv], qkv[:, H + Hkv :]
            if self.rotary is not None:
                qk = self.rotary(qk, start)
            k, v = cache.append(qk[:, H:], v)
            mixed = F.scaled_dot_product_attention(qk[:, :H], k, v, attn_mask=mask, enable_gqa=Hkv != H)
            x = x.add_(block.out[1]).addmm_(mixed.view(B, H * D), block.out[0])
            hidden = torch.addmm(block.up[1], self._norm(x, *block.norms[1]), block.up[0])
            if self.config.activation == "swiglu":
                gate, hidden = hidden.chunk(2, -1)
                hidden = F.silu(gate) * hidden
            else:
                hidden = getattr(F, self.config.activation)(hidden)
            x = x.add_(block.down[1]).addmm_(hidden, block.down[0])
        return self._norm(x, self.model.norm.weight, getattr(self.model.norm, "bias", None)) @ self.output
