"""What several mechanisms have in common: checks, working types, and the naive scores."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook import masks
from attnbook.scores import scaled_dot
from attnbook.shapes import AttentionShape, check_attention, check_mask, check_query_and_key, mismatch, tensor_shape


def check_call(query: Tensor, key: Tensor, value: Tensor, *, equal_lengths: bool = False) -> AttentionShape:
    """Check queries, keys and values: shapes, types, devices, and no NaN in queries and keys.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        equal_lengths: also that L = S.
    Returns:
        Their sizes.
    Raises:
        ValueError: they do not fit.
    """
    shape = check_attention(query, key, value)
    if equal_lengths and shape.L != shape.S:
        raise mismatch("key", f"as many positions as query has, S = L = {shape.L}", tensor_shape(key))
    check_query_and_key(query, key)
    return shape


def check_pair_mask(attn_mask: Tensor | None, shape: AttentionShape) -> Tensor | None:
    """Check a mask that may differ from query to query.

    Args:
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        shape: of the call.
    Returns:
        The mask with four axes, or None.
    Raises:
        ValueError: not boolean, or it does not broadcast.
    """
    return None if attn_mask is None else check_mask("attn_mask", attn_mask, (shape.B, shape.H, shape.L, shape.S))


def check_key_mask(attn_mask: Tensor | None, shape: AttentionShape) -> Tensor | None:
    """Check a mask that hides keys from all queries alike, as padding does.

    Args:
        attn_mask: broadcastable to (B, H, 1, S), bool; True = may be attended to.
        shape: of the call.
    Returns:
        The mask, viewed (B or 1, H or 1, 1, S or 1), or None.
    Raises:
        ValueError: not boolean, it does not broadcast, or it differs from query to query.
    """
    mask = check_pair_mask(attn_mask, shape)
    if mask is not None and mask.shape[2] != 1:
        expected = "a mask of keys, (…, 1, S), the same for all queries: this mechanism never looks at single pairs"
        raise mismatch("attn_mask", expected, attn_mask)
    return mask


def never_causal(is_causal: bool, instead: str) -> None:
    """Refuse ``is_causal=True`` where a mechanism mixes all positions before it attends.

    Args:
        is_causal: what the caller asked for.
        instead: names of mechanisms that can.
    Raises:
        ValueError: it is true.
    """
    if is_causal:
        raise mismatch("is_causal", f"False: this mechanism has no causal form (these have: {instead})", "True")


def working_type(query: Tensor) -> torch.dtype:
    """Return the type to compute in: float64 for float64, float32 for the rest, so that half precision is summed well.

    Args:
        query: of the call.
    """
    return torch.promote_types(query.dtype, torch.float32)


def widen(x: Tensor, shape: AttentionShape) -> Tensor:
    """Bring keys or values into the working type, one head for each query head.

    Args:
        x: (B, Hkv, S, X).
        shape: of the call.
    Returns:
        (B, H, S, X), float32 or float64.
    """
    x = x.to(working_type(x))
    return x if shape.Hkv == shape.H else x.repeat_interleave(shape.H // shape.Hkv, dim=1)


def naive_scores(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check the arguments of a mechanism, and score every pair.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
    Returns:
        Scores (B, H, L, S), the two masks as one or None, and values (B, H, S, Dv), one head for each query head.
        Scores and values of half precision come as float32.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    """
    shape = check_call(query, key, value)
    mask = check_pair_mask(attn_mask, shape)
    if is_causal:
        triangle = masks.causal(shape.L, shape.S, device=query.device)
        mask = triangle if mask is None else mask & triangle
    key, value = widen(key, shape), widen(value, shape)
    return scaled_dot(query.to(key.dtype), key, scale=scale), mask, value
