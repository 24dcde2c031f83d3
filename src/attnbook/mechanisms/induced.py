"""Attention through a few learned queries: a long input is read by them, at a cost linear in its length."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, never_causal, working_type
from attnbook.mechanisms.tiled import tiled_attention
from attnbook.shapes import check_tensor, mismatch, tensor_shape


def _for_each_sequence(argument: str, learned: Tensor, key: Tensor) -> Tensor:
    """Give every sequence of a batch the same learned queries: (H, M, D) → (B, H, M, D)."""
    check_tensor(argument, learned, "H M D")
    check_tensor("key", key, "B Hkv S D")
    if learned.shape[-1] != key.shape[-1]:
        raise mismatch(argument, f"last axis D = {key.shape[-1]}, that of key", tensor_shape(learned))
    return learned.expand(key.shape[0], -1, -1, -1)


def perceiver_attention(
    latents: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Read a long input with a few queries that are the network's own: its latent array.

    Softmax attention from M latents to S positions ({cite}`jaegle2021`, §3.1): however long the input, what comes out,
    and whatever is done to it afterwards, has the size of the latents. Differs from the paper: the projections, the
    layers between two reads and the position features of the input are the caller's.

    Args:
        latents: (H, M, D) float, learned and the same for every sequence; or (B, H, M, D), for a second read.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, H, M, S), bool; True = may be read.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, M, Dv), dtype of latents. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    Cost: O(SMD) time, O(S + M) memory beyond inputs and output.
    """
    if check_tensor("latents", latents, "... M D").dim() != 4:
        latents = _for_each_sequence("latents", latents, key)
    return tiled_attention(latents, key, value, attn_mask=attn_mask, scale=scale)


def induced_set_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    inducing: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend to M summaries of the keys and values instead of to all S of them.

    The inducing points attend to the keys and pool keys and values alike; the queries attend to what was pooled. These
    are the two attentions of the induced set attention block ({cite}`lee2019`, §3.1). With L = S it is equivariant to
    permutations of the set. Differs from the paper: its blocks have residuals, norms and feed-forward layers around
    each attention, which are the caller's; and its second attention projects the pooled set anew, which is the same as
    pooling projected keys, but its first has keys of its own, where we use one set of keys for both.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        inducing: (H, M, D), learned: the inducing points.
        attn_mask: broadcastable to (B, H, 1, S), bool; True = belongs to the set.
        is_causal: must be false: the summaries mix all positions.
        scale: factor of both attentions' scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN, a mask that differs from query to query, ``is_causal``.
    Cost: O((L + S)MD) time, O(L + S + MD) memory beyond inputs and output.
    """
    never_causal(is_causal, "attention, linear_attention, sliding_window_attention")
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    points = _for_each_sequence("inducing", inducing, key)
    if points.shape[1] != shape.H:
        raise mismatch("inducing", f"(H, M, D) with H = {shape.H}", tensor_shape(inducing))
    work = working_type(query)
    key, value = key.to(work), value.to(work)
    pooled = tiled_attention(points.to(work), key, torch.cat([key, value], -1), attn_mask=mask, scale=scale)
    keys, values = pooled.split([shape.D, shape.Dv], -1)  # (B, H, M, D), (B, H, M, Dv)
    return tiled_attention(query.to(work), keys, values, scale=scale).to(query.dtype)
