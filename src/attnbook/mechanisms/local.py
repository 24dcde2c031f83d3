"""Local attention: each query looks at a window of keys around one position, given or predicted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnbook.mechanisms.common import naive_scores
from attnbook.normalizers import softmax
from attnbook.shapes import (
    check_broadcastable,
    check_count,
    check_mask,
    check_no_nan,
    check_tensor,
    describe,
    mismatch,
)


def local_weights(
    scores: Tensor, positions: Tensor, *, half_window: float, gaussian: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Normalise scores inside a window around each query's position, and favour its middle.

    Keys s with ``|s − p| ≤ half_window`` share a softmax; the result is multiplied by exp(−(s − p)² / 2σ²) with
    σ = half_window / 2, and not normalised again ({cite}`luong2015`, eq. 10, "local-p"). Without the Gaussian this is
    their "local-m". Differentiable in the positions too, almost everywhere. Chapter: {ref}`sec-01-alignment`.

    Args:
        scores: (…, L, S).
        positions: broadcastable to (…, L): where each query looks, in keys counted from 0; need not be whole.
        half_window: how far the window reaches to either side; the paper's D, there 10.
        gaussian: multiply by the Gaussian.
        mask: bool, broadcastable to the scores; True = may attend.
    Returns:
        (…, L, S). Rows sum to 1 without the Gaussian, to less with it, and to 0 where the window holds no key.
    Raises:
        ValueError: shapes that do not match, NaN, a window that is not positive.
    """
    check_tensor("scores", scores, "... L S")
    if not isinstance(positions, Tensor) or not positions.is_floating_point():
        raise mismatch("positions", "a floating tensor", describe(positions))
    positions = check_broadcastable("positions", check_no_nan("positions", positions), scores.shape[:-1], "... L")
    if isinstance(half_window, bool) or not isinstance(half_window, (int, float)) or not half_window > 0:
        raise mismatch("half_window", "a number > 0", describe(half_window))
    distance = torch.arange(scores.shape[-1], device=scores.device) - positions[..., None]  # (…, L, S)
    window = distance.abs() <= half_window
    if mask is not None:
        window = window & check_mask("mask", mask, scores.shape, "*scores.shape")
    weights = softmax(scores, mask=window)
    if not gaussian:
        return weights
    return weights * torch.exp(-0.5 * (distance / (half_window / 2)).square()).to(weights.dtype)


class PredictedPositions(nn.Module):
    """Predict where each query looks: S · sigmoid(vᵀ tanh(W q)) ({cite}`luong2015`, eq. 9).

    Args:
        query_dim: D.
        hidden_dim: the width of the hidden layer.
    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, query_dim: int, hidden_dim: int):
        super().__init__()
        check_count("query_dim", query_dim)
        check_count("hidden_dim", hidden_dim)
        self.hidden = nn.Linear(query_dim, hidden_dim, bias=False)
        self.vector = nn.Linear(hidden_dim, 1, bias=False)

    def forward(self, query: Tensor, lengths: Tensor) -> Tensor:
        """Return positions (…, L), between 0 and the length, for queries (…, L, D) and lengths (…) of the sources."""
        check_tensor("query", query, "... L D")
        if not isinstance(lengths, Tensor) or lengths.shape != query.shape[:-2]:
            raise mismatch("lengths", f"a tensor of shape {tuple(query.shape[:-2])}", describe(lengths))
        share = torch.sigmoid(self.vector(torch.tanh(self.hidden(query))))[..., 0]  # (…, L)
        return lengths[..., None].to(share.dtype) * share


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    positions: Tensor | None = None,
    half_window: float = 10,
    gaussian: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Mix the values near one position of each query, by scaled dot products and by nearness.

    {cite}`luong2015`, §3.2. Differs from the paper: its queries and keys meet in its "general" score; and it computes
    the scores of the window alone, where we mask a full matrix. Chapter: {ref}`sec-01-alignment`.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        positions: broadcastable to (B, H, L), float, in keys counted from 0; by default each query's own place, ends
            aligned.
        half_window: how far the window reaches to either side.
        gaussian: multiply the weights by a Gaussian around the position, as :func:`local_weights` does.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN, a window that is not positive.
    Cost: O(LSD) time and O(LS) memory here; O(L·half_window·D) with a kernel that computes the window alone.
    """
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    if positions is None:
        length, keys = scores.shape[-2:]
        own_place = torch.arange(length, device=query.device) + (keys - length)
        positions = own_place.to(scores.dtype)
    weights = local_weights(scores, positions, half_window=half_window, gaussian=gaussian, mask=mask)
    return (weights @ value).to(query.dtype)
