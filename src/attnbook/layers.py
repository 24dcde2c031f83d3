"""Layers: what models are built from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbook.cache import Cache, StaticCache
from attnbook.functional import attention
from attnbook.positions import RotaryEmbedding
from attnbook.shapes import check_choice, check_count, check_probability, check_tensor, describe, mismatch, tensor_shape

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
GATED = ("swiglu", "geglu")
ACTIVATIONS = ("relu", "gelu", *GATED)


class MultiHeadAttention(nn.Module):
    """Attend with several heads at once: each projects queries, keys and values to a space of its own.

    The heads' outputs are concatenated and projected back ({cite}`vaswani2017`, §3.2.2). Fewer key–value heads than
    query heads give grouped-query attention ({cite}`ainslie2023`), a single one multi-query attention
    ({cite}`shazeer2019`).

    Args:
        embed_dim: E, width of queries and of the output.
        num_heads: H.
        num_kv_heads: Hkv, a divisor of H; H by default.
        head_dim: D; E / H by default.
        bias: give the four projections biases.
        key_dim: width of the keys' source, where it is not E.
        value_dim: width of the values' source, where it is not that of the keys.
        dropout: probability of dropping a weight in training.
        rotary: turns queries and keys by their positions; self-attention only.
        scale: factor of the scores; 1/√D by default.
        normalizer: as for :func:`attnbook.attention`.
        backend: as for :func:`attnbook.attention`.
    Raises:
        ValueError: sizes below 1, E not a multiple of H where head_dim is not given, H not a multiple of Hkv.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        scale: float | None = None,
        normalizer: str | Callable[..., Tensor] = "softmax",
        backend: str = "auto",
    ):
        super().__init__()
        check_count("embed_dim", embed_dim)
        check_count("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else check_count("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise mismatch("num_kv_heads", f"a divisor of num_heads = {num_heads}", num_kv_heads)
        if head_dim is None and embed_dim % num_heads:
            raise mismatch("num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads)
        head_dim = embed_dim // num_heads if head_dim is None else check_count("head_dim", head_dim)
        key_dim = embed_dim if key_dim is None else check_count("key_dim", key_dim)
        value_dim = key_dim if value_dim is None else check_count("value_dim", value_dim)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout = check_probability("dropout", dropout)
        self.rotary, self.scale, self.normalizer, self.backend = rotary, scale, normalizer, backend
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(key_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(value_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)

    def _split(self, x: Tensor, projection: nn.Linear, name: str) -> Tensor:
        """Project, and give each head its part: (B, L, E) → (B, H, L, D)."""
        check_tensor(name, x, "B L E")
        if x.shape[-1] != projection.in_features:
            raise mismatch(name, f"last axis {projection.in_features}", tensor_shape(x))
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        is_causal: bool = False,
        cache: Cache | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Attend from each query to the keys.

        Args:
            query: (B, L, E).
            key: (B, S, key_dim); the queries by default (self-attention).
            value: (B, S, value_dim); the keys by default.
            attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
            score_bias: broadcastable to (B, H, L, S), added to the scaled scores.
            is_causal: let each position see itself and earlier ones, ends aligned.
            cache: holds the keys and values of earlier positions; these are appended, and all of them attended to.
            need_weights: return the weights too.
        Returns:
            (B, L, E); with need_weights also (B, H, L, S).
        Raises:
            ValueError: shapes that do not match, and as for :func:`attnbook.attention`.
        """
        if self.rotary is not None and key is not None:
            raise mismatch("key", "None: rotary positions are for self-attention", key)
        key = query if key is None else key
        value = key if value is None else value
        q = self._split(query, self.q_proj, "query")
        k = self._split(key, self.k_proj, "key")
        v = self._split(value, self.v_proj, "value")
        if self.rotary is not None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + q.shape[2], device=q.device)
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if cache is not None:
            k, v = cache.update(k, v)
        mixed = attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            bias=score_bias,
            is_causal=is_causal,
            scale=self.scale,
            normalizer=self.normalizer,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=need_weights,
            backend=self.backend,
        )
        mixed, weights = mixed if need_weights else (mixed, None)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, H, L, D) → (B, L, H·D) → (B, L, E)
        return (output, weights) if need_weights else output

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiHeadAttention:
        """Copy PyTorch's layer; the copy gives equal outputs (batch first, masks in our convention).

        Args:
            module: without ``add_bias_kv`` and ``add_zero_attn``.
        Returns:
            A layer with copied weights, in the module's dtype, device and mode.
        Raises:
            ValueError: no nn.MultiheadAttention, or one of the two options is on.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise mismatch("module", "an nn.MultiheadAttention", module)
        if module.bias_k is not None or module.add_zero_attn:
            raise mismatch("module", "add_bias_kv=False and add_zero_attn=False", "one of them on")
        ours = cls(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            key_dim=module.kdim,
            value_dim=module.vdim,
            dropout=module.dropout,
        ).to(module.out_proj.weight)
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        with torch.no_grad():
            for linear, weight, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights, biases, strict=True):
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
        ours.out_proj.load_state_dict(module.out_proj.state_dict())
        return ours.train(module.training)


def make_norm(kind: str, width: int, eps: float | None = None) -> nn.Module:
    """Make a norm over the last axis.

    Args:
        kind: "layer" ({cite}`ba2016`) or "rms" ({cite}`zhang2019`).
        width: E.
        eps: added to the variance; PyTorch's default by default.
    Raises:
        ValueError: an unknown kind, an eps that is not positive.
    """
    check_choice("norm", kind, tuple(NORMS))
    if eps is None:
        return NORMS[kind](width)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        raise mismatch("norm_eps", "a number > 0", describe(eps))
    return NORMS[kind](width, eps=eps)


class Trace(NamedTuple):
    """What a stack of blocks did, for a look inside.

    Attributes:
        hidden: the residual stream (B, L, E) before the first block and after each.
        weights: of each block's self-attention, (B, H, L, S).
        cross_weights: of each block's cross-attention; empty where there is none.
    """

    hidden: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    cross_weights: tuple[Tensor, ...] = ()


def run_blocks(
    blocks: Iterable[TransformerBlock], x: Tensor, *, caches: Sequence[Cache] | None = None, **options: Any
) -> tuple[Tensor, Trace]:
    """Run a stack of blocks, and keep what each made.

    Args:
        blocks: in their order.
        x: (B, L, E).
        caches: of the self-attentions, one for each block.
        options: passed on to :meth:`TransformerBlock.forward`.
    Returns:
        (B, L, E), and the trace.
    """
    hidden, weights, cross = [x], [], []
    for i, block in enumerate(blocks):
        x, own, other = block(x, cache=caches[i] if caches else None, need_weights=True, **options)
        hidden.append(x)
        weights.append(own)
        cross += [] if other is None else [other]
    return x, Trace(tuple(hidden), tuple(weights), tuple(cross))


class FeedForward(nn.Module):
    """Transform each position on its own: expand, apply a non-linearity, project back.

    Args:
        width: E.
        hidden: width in between; 4E by default ({cite}`vaswani2017`, §3.3).
        activation: "relu", "gelu" ({cite}`hendrycks2016`), or a gated form of {cite}`shazeer2020`, eq. 6, which has
            three matrices: "swiglu", or "geglu" (with the tanh form of GELU, as in T5's code).
        bias: give the projections biases.
        dropout: probability of dropping a hidden unit in training.
    Raises:
        ValueError: sizes below 1, an unknown activation.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = 4 * check_count("width", width) if hidden is None else check_count("hidden", hidden)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if activation in GATED else None
        self.down = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(check_probability("dropout", dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, E) to (…, E)."""
        if self.activation == "swiglu":
            hidden = nn.functional.silu(self.gate(x)) * self.up(x)
        elif self.activation == "geglu":
            hidden = nn.functional.gelu(self.gate(x), approximate="tanh") * self.up(x)
        else:
            hidden = getattr(nn.functional, self.activation)(self.up(x))
        return self.down(self.dropout(hidden))


class TransformerBlock(nn.Module):
    """One Transformer layer: self-attention, cross-attention where there is a memory, and a feed-forward network.

    Each is added to the residual stream. With ``norm_first`` the norm stands before each part, so that the stream
    itself is never normalised (pre-norm); without, after the sum, as {cite}`vaswani2017` has it (post-norm).

    Args:
        width: E.
        num_heads: H.
        hidden: width of the feed-forward network; 4E by default.
        cross_attention: give the block a second attention, to an encoder's output.
        norm: "layer" or "rms".
        norm_eps: what the norms add to the variance; PyTorch's default by default.
        norm_first: pre-norm rather than post-norm.
        activation: as for :class:`FeedForward`.
        bias: give all projections biases.
        dropout: probability of dropping what a part adds to the stream, in training.
        cross_options: passed on to the cross-attention's :class:`MultiHeadAttention`.
        attention_options: passed on to the self-attention's :class:`MultiHeadAttention`.
    Raises:
        ValueError: an unknown norm, and as for the parts.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        cross_attention: bool = False,
        norm: str = "layer",
        norm_eps: float | None = None,
        norm_first: bool = True,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        cross_options: Mapping[str, Any] | None = None,
        **attention_options: Any,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.attention = MultiHeadAttention(width, num_heads, bias=bias, dropout=dropout, **attention_options)
        self.attention_norm = make_norm(norm, width, norm_eps)
        self.cross = None
        if cross_attention:
            self.cross = MultiHeadAttention(width, num_heads, bias=bias, dropout=dropout, **(cross_options or {}))
        self.cross_norm = make_norm(norm, width, norm_eps) if cross_attention else None
        self.feed_forward = FeedForward(width, hidden, activation=activation, bias=bias)
        self.feed_forward_norm = make_norm(norm, width, norm_eps)
        self.dropout = nn.Dropout(check_probability("dropout", dropout))

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor | None]:
        made = part(norm(x) if self.norm_first else x)
        added, weights = made if isinstance(made, tuple) else (made, None)
        x = x + self.dropout(added)
        return (x if self.norm_first else norm(x)), weights

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        attn_mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        memory_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: Cache | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Update the residual stream.

        Args:
            x: (B, L, E).
            memory: (B, S, E), an encoder's output; required by a block with cross-attention.
            attn_mask: broadcastable to (B, H, L, L), bool; True = may attend.
            score_bias: broadcastable to (B, H, L, L), added to the self-attention's scores.
            memory_mask: broadcastable to (B, H, L, S), bool.
            is_causal: causal self-attention.
            cache: of the self-attention.
            need_weights: return the weights of both attentions too.
        Returns:
            (B, L, E); with need_weights also the self-attention's weights (B, H, L, L) and the cross-attention's
            (B, H, L, S), or None where there is none.
        Raises:
            ValueError: a memory without cross-attention or the reverse, and as for the parts.
        """
        if (memory is None) != (self.cross is None):
            raise mismatch("memory", "None" if self.cross is None else "a tensor (B, S, E)", memory)
        options = {"attn_mask": attn_mask, "score_bias": score_bias, "is_causal": is_causal}
        options |= {"cache": cache, "need_weights": need_weights}
        x, weights = self._add(x, self.attention_norm, lambda y: self.attention(y, **options))
        cross_weights = None
        if self.cross is not None:
            x, cross_weights = self._add(
                x, self.cross_norm, lambda y: self.cross(y, memory, attn_mask=memory_mask, need_weights=need_weights)
            )
        x, _ = self._add(x, self.feed_forward_norm, self.feed_forward)
        return (x, weights, cross_weights) if need_weights else x


class CrossBlock(nn.Module):
    """Read a memory without looking at oneself: cross-attention and a feed-forward network, each added to the stream.

    Norms stand before the parts, on the memory too. With ``gated``, each part is multiplied by the tanh of a learned
    number that starts at 0, so that a fresh block changes nothing ({cite}`alayrac2022`, §2.2).

    Args:
        width: E.
        num_heads: H.
        memory_width: width of the memory; E by default.
        hidden: width of the feed-forward network; 4E by default.
        gated: let the block start as the identity.
        activation: as for :class:`FeedForward`.
        dropout: probability of dropping what a part adds to the stream, in training.
        attention_options: passed on to :class:`MultiHeadAttention`.
    Raises:
        ValueError: as for the parts.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        memory_width: int | None = None,
        hidden: int | None = None,
        gated: bool = False,
        activation: str = "gelu",
        dropout: float = 0.0,
        **attention_options: Any,
    ):
        super().__init__()
        memory_width = width if memory_width is None else memory_width
        self.attention = MultiHeadAttention(
            width, num_heads, key_dim=memory_width, dropout=dropout, **attention_options
        )
        self.attention_norm = make_norm("layer", width)
        self.memory_norm = make_norm("layer", memory_width)
        self.feed_forward = FeedForward(width, hidden, activation=activation)
        self.feed_forward_norm = make_norm("layer", width)
        self.gates = nn.Parameter(torch.zeros(2)) if gated else None
        self.dropout = nn.Dropout(check_probability("dropout", dropout))

    def forward(
        self, x: Tensor, memory: Tensor, *, memory_mask: Tensor | None = None, need_weights: bool = False
    ) -> Any:
        """Update the residual stream.

        Args:
            x: (B, L, E).
            memory: (B, S, memory_width).
            memory_mask: broadcastable to (B, H, L, S), bool; True = may attend.
            need_weights: return the weights too.
        Returns:
            (B, L, E); with need_weights also (B, H, L, S).
        Raises:
            ValueError: shapes that do not match.
        """
        for name, tensor, norm in (("x", x, self.attention_norm), ("memory", memory, self.memory_norm)):
            if check_tensor(name, tensor, "B L E").shape[-1] != norm.normalized_shape[0]:
                raise mismatch(name, f"last axis {norm.normalized_shape[0]}", tensor_shape(tensor))
        first, second = (1.0, 1.0) if self.gates is None else self.gates.tanh()
        read = self.attention(
            self.attention_norm(x), self.memory_norm(memory), attn_mask=memory_mask, need_weights=need_weights
        )
        read, weights = read if need_weights else (read, None)
        x = x + first * self.dropout(read)
        x = x + second * self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return (x, weights) if need_weights else x


def make_caches(
    blocks: Iterable[TransformerBlock],
    batch_size: int,
    max_length: int,
    like: Tensor,
    *,
    kind: type[Cache] = StaticCache,
    **options: Any,
) -> list[Cache]:
    """Set memory aside for decoding: one cache for each block's self-attention.

    Args:
        blocks: in their order.
        batch_size: B.
        max_length: positions.
        like: a tensor of the element type and device wanted.
        kind: the caches' class, of ``attnbook.cache``.
        options: of that class.
    """
    parts = [block.attention for block in blocks]
    options = {"dtype": like.dtype, "device": like.device, **options}
    return [kind(batch_size, x.num_kv_heads, max_length, x.head_dim, **options) for x in parts]
