"""Multi-head latent attention: keys and values of all heads kept as one small vector for each position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnbook.mechanisms.common import working_type
from attnbook.mechanisms.tiled import tiled_attention
from attnbook.positions import RotaryEmbedding
from attnbook.shapes import (
    check_choice,
    check_count,
    check_no_nan,
    check_tensor,
    describe_dtype,
    mismatch,
    tensor_shape,
)

FORMS = ("expanded", "absorbed")


def _check_shape(argument: str, tensor: Tensor, axes: str, shape: tuple[int, ...], query: Tensor) -> Tensor:
    if check_tensor(argument, tensor, axes).shape != shape:
        raise mismatch(argument, f"({', '.join(axes.split())}) = {shape}", tensor_shape(tensor))
    if tensor.dtype != query.dtype:
        raise mismatch(argument, f"{describe_dtype(query)}, the type of query", describe_dtype(tensor))
    return check_no_nan(argument, tensor)


def latent_attention(
    query: Tensor,
    latent: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    form: str = "expanded",
) -> Tensor:
    """Attend to keys and values that every head makes, by matrices of its own, from one latent vector a position.

    With c the latents: kⱼ = W^UK cⱼ and vⱼ = W^UV cⱼ for each head; the score is (q·k + q^R·k^R)·scale, in which k^R, a
    key of a few components turned by its position, is the same for all heads ({cite}`deepseek2024`, §2.1.2 and §2.1.3).
    A cache holds c and k^R only: C + R numbers a position instead of 2HD. The rotary part stands apart because a
    rotation between W^UK and the query could not be absorbed.

    Args:
        query: (B, H, L, D) float, the part of the queries without position.
        latent: (B, S, C), c; what is projected to it, and normalised, is the caller's.
        key_up: (H, D, C), W^UK.
        value_up: (H, Dv, C), W^UV.
        query_rope: (B, H, L, R), q^R, already turned by its position; None for no rotary part.
        key_rope: (B, S, R), k^R, already turned, shared by all heads.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√(D + R) by default.
        form: "expanded" makes keys and values of all heads, as in training; "absorbed" multiplies the queries by W^UK
            and attends to the latents themselves as one key–value head, as in decoding. Equal but for rounding.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN, one rotary part without the other, an unknown form.
    Cost: expanded O(HS(D + Dv)C + HLS(D + R + Dv)) time and O(HS(D + R + Dv)) memory; absorbed O(HL(D + Dv)C +
    HLS(2C + R)) time and O(S(C + R) + HLC) memory.
    """
    B, H, L, D = check_tensor("query", query, "B H L D").shape
    check_tensor("latent", latent, "B S C")
    check_tensor("value_up", value_up, "H Dv C")
    (S, C), Dv = latent.shape[1:], value_up.shape[1]
    check_no_nan("query", query)
    _check_shape("latent", latent, "B S C", (B, S, C), query)
    _check_shape("key_up", key_up, "H D C", (H, D, C), query)
    _check_shape("value_up", value_up, "H Dv C", (H, Dv, C), query)
    if (query_rope is None) != (key_rope is None):
        raise mismatch("query_rope, key_rope", "both or neither", "one of them")
    check_choice("form", form, FORMS)
    R = 0
    if query_rope is not None:
        R = check_tensor("query_rope", query_rope, "B H L R").shape[-1]
        _check_shape("query_rope", query_rope, "B H L R", (B, H, L, R), query)
        _check_shape("key_rope", key_rope, "B S R", (B, S, R), query)

    work = working_type(query)
    q, c = query.to(work), latent.to(work)[:, None]  # (B, 1, S, C)
    up_k, up_v = key_up.to(work), value_up.to(work)
    if form == "expanded":
        key, value = c @ up_k.transpose(1, 2), c @ up_v.transpose(1, 2)  # (B, H, S, D), (B, H, S, Dv)
    else:
        q, key, value = q @ up_k, c, c  # q·(W^UK c) = (W^UKᵀ q)·c: (B, H, L, C) and one key–value head
    if query_rope is not None:
        turned = key_rope.to(work)[:, None].expand(-1, key.shape[1], -1, -1)
        q, key = torch.cat([q, query_rope.to(work)], -1), torch.cat([key, turned], -1)
    scale = (D + R) ** -0.5 if scale is None else scale
    mixed = tiled_attention(q, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    if form == "absorbed":
        mixed = mixed @ up_v.transpose(1, 2)  # (B, H, L, C) → (B, H, L, Dv)
    return mixed.to(query.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention with its projections ({cite}`deepseek2024`, §2.1).

    What a position leaves for later queries is :meth:`compress`'s pair: latent_dim + rope_dim numbers.

    Args:
        embed_dim: E.
        num_heads: H.
        latent_dim: C, the width of what is cached.
        head_dim: D, of the part of queries and keys without position.
        rope_dim: R, even, of the rotary part.
        value_dim: Dv; D by default.
        query_latent_dim: compress the queries too, to this width, which saves activations in training; None for one
            matrix.
        base: of the rotary embedding.
        eps: of the RMS norms of the latents.
    Raises:
        ValueError: a size below 1, rope_dim odd.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        latent_dim: int,
        head_dim: int,
        rope_dim: int,
        value_dim: int | None = None,
        query_latent_dim: int | None = None,
        base: float = 10000.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        check_count("embed_dim", embed_dim)
        if check_count("rope_dim", rope_dim, least=2) % 2:
            raise mismatch("rope_dim", "an even integer", rope_dim)
        self.num_heads = check_count("num_heads", num_heads)
        self.latent_dim, self.head_dim = check_count("latent_dim", latent_dim), check_count("head_dim", head_dim)
        self.value_dim = head_dim if value_dim is None else check_count("value_dim", value_dim)
        self.rotary = RotaryEmbedding(rope_dim, base=base, pairing="interleaved")
        query_width = num_heads * (head_dim + rope_dim)
        if query_latent_dim is None:
            self.query = nn.Linear(embed_dim, query_width, bias=False)
        else:
            self.query = nn.Sequential(
                nn.Linear(embed_dim, check_count("query_latent_dim", query_latent_dim), bias=False),
                nn.RMSNorm(query_latent_dim, eps=eps),
                nn.Linear(query_latent_dim, query_width, bias=False),
            )
        self.down = nn.Linear(embed_dim, latent_dim + rope_dim, bias=False)
        self.norm = nn.RMSNorm(latent_dim, eps=eps)
        self.up = nn.Linear(latent_dim, num_heads * (head_dim + self.value_dim), bias=False)
        self.output = nn.Linear(num_heads * self.value_dim, embed_dim, bias=False)

    def compress(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a cache keeps of (B, S, E) at positions (S,): latents (B, S, C) and turned keys (B, S, R)."""
        down = self.down(check_tensor("x", x, "B S E"))
        latent, key_rope = down.split([self.latent_dim, self.rotary.head_dim], -1)
        return self.norm(latent), self.rotary(key_rope, positions)

    def forward(
        self,
        x: Tensor,
        *,
        past: tuple[Tensor, Tensor] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        form: str = "expanded",
    ) -> Tensor:
        """Attend from each position to itself and to those before it.

        Args:
            x: (B, L, E).
            past: what :meth:`compress` returned for the positions before, concatenated; None at the start.
            attn_mask: broadcastable to (B, H, L, S), bool; True = may attend; S counts the past too.
            is_causal: as for :func:`latent_attention`.
            form: as for :func:`latent_attention`.
        Returns:
            (B, L, E).
        Raises:
            ValueError: as for :func:`latent_attention`.
        """
        check_tensor("x", x, "B L E")
        start = 0 if past is None else past[0].shape[1]
        places = torch.arange(start, start + x.shape[1], device=x.device)
        latent, key_rope = self.compress(x, places)
        if past is not None:
            latent, key_rope = torch.cat([past[0], latent], 1), torch.cat([past[1], key_rope], 1)
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D + R)
        q, q_rope = q.split([self.head_dim, self.rotary.head_dim], -1)
        up = self.up.weight.unflatten(0, (self.num_heads, -1))  # (H, D + Dv, C)
        key_up, value_up = up.split([self.head_dim, self.value_dim], 1)
        mixed = latent_attention(
            q,
            latent,
            key_up,
            value_up,
            query_rope=self.rotary(q_rope, places),
            key_rope=key_rope,
            attn_mask=attn_mask,
            is_causal=is_causal,
            form=form,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, H, L, Dv) → (B, L, H·Dv) → (B, L, E)
