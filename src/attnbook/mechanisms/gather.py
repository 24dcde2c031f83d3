"""Gathering of positions: what mechanisms share whose pattern comes from the content."""

from __future__ import annotations

from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Pick rows along the axis of positions, with an index for each head.

    Args:
        x: (B, H, S, X), or (B, H, S).
        index: (B, H, …) int64, in [0, S).
    Returns:
        (B, H, …, X), or (B, H, …).
    """
    flat = index.flatten(2)
    if x.dim() == 3:
        return x.gather(2, flat).view(index.shape)
    return x.gather(2, flat[..., None].expand(-1, -1, -1, x.shape[3])).view(*index.shape, x.shape[3])
