"""What mechanisms that build the whole matrix of scores have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook import masks
from attnbook.scores import scaled_dot
from attnbook.shapes import check_attention, check_mask, check_no_nan


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
    shape = check_attention(query, key, value)
    check_no_nan("query", query)
    check_no_nan("key", key)
    if attn_mask is not None:
        attn_mask = check_mask("attn_mask", attn_mask, (shape.B, shape.H, shape.L, shape.S))
    if is_causal:
        triangle = masks.causal(shape.L, shape.S, device=query.device)
        attn_mask = triangle if attn_mask is None else attn_mask & triangle
    work = torch.promote_types(query.dtype, torch.float32)
    key, value = (x.to(work).repeat_interleave(shape.H // shape.Hkv, dim=1) for x in (key, value))
    return scaled_dot(query.to(work), key, scale=scale), attn_mask, value
