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


class _Product:
    """Projections of one input, side by side: x ↦ x W + b.

    A product with one row reads W fastest along its longer axis: this one is stored contiguously. For several rows the
    matrix is packed once more, as oneDNN's products want it: they take two thirds of the time of the others.

    Args:
        linears: the projections.
    """

    def __init__(self, *linears: torch.nn.Linear):
        weight = torch.cat([linear.weight for linear in linears])  # (widths together, E)
        nothing = weight.new_zeros(())
        biases = [nothing.expand(len(each.weight)) if each.bias is None else each.bias for each in linears]
        self.bias = torch.cat(biases)
        self.weight = weight.t() if weight.shape[1] > weight.shape[0] else weight.t().contiguous()
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x (B, E)."""
        if len(x) == 1 or not self._packs():
            return torch.addmm(self.bias, x, self.weight)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.t().contiguous(), len(x))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def _packs(self) -> bool:
        return self.weight.is_cpu and self.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class _Block(NamedTuple):
    """A block's matrices, those that read the same vector side by side.

    Attributes:
        norms: (gain, bias) of the norm before attention and of the one before the feed-forward network.
        qkv: from E to (H + 2·Hkv)·D.
        out: from H·D to E.
        up: from E to hidden, with the gate's columns before them where there is a gate.
        down: from hidden to E.
    """

    norms: tuple[tuple[Tensor, Tensor | None], ...]
    qkv: _Product
    out: _Product
    up: _Product
    down: _Product


def _lay_out(block: TransformerBlock) -> _Block:
    attention, network = block.attention, block.feed_forward
    rises = [network.up] if network.gate is None else [network.gate, network.up]
    return _Block(
        tuple((norm.weight, getattr(norm, "bias", None)) for norm in (block.attention_norm, block.feed_forward_norm)),
        _Product(attention.q_proj, attention.k_proj, attention.v_proj),
        _Product(attention.out_proj),
        _Product(*rises),
        _Product(network.down),
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
            qkv = block.qkv(self._norm(x, *block.norms[0])).view(B, H + 2 * Hkv, 1, D)
            qk, v = qkv[:, : H + Hkv], qkv[:, H + Hkv :]
            if self.rotary is not None:
                qk = self.rotary(qk, start)
            k, v = cache.append(qk[:, H:], v)
            mixed = F.scaled_dot_product_attention(qk[:, :H], k, v, attn_mask=mask, enable_gqa=Hkv != H)
            x = x.add_(block.out(mixed.view(B, H * D)))
            hidden = block.up(self._norm(x, *block.norms[1]))
            if self.config.activation == "swiglu":
                gate, hidden = hidden.chunk(2, -1)
                hidden = F.silu(gate) * hidden
            else:
                hidden = getattr(F, self.config.activation)(hidden)
            x = x.add_(block.down(hidden))
        return self._norm(x, self.model.norm.weight, getattr(self.model.norm, "bias", None)) @ self.output
