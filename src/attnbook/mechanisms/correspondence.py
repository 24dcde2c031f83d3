"""Correspondence of two images: patches seen in a frame of their own, and matching by attention to positions."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.mechanisms.common import working_type
from attnbook.normalizers import softmax
from attnbook.scores import cosine
from attnbook.shapes import (
    check_count,
    check_mask,
    check_no_nan,
    check_tensor,
    describe_dtype,
    mismatch,
    tensor_shape,
)


def _sample(features: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Read (B, C, H, W) at points (B, N), bilinearly, in pixels counted from 0; zero outside: (B, C, N)."""
    height, width = features.shape[2:]
    flat = features.flatten(2)  # (B, C, H·W)
    left, top = x.floor(), y.floor()
    total = 0
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            read = flat.gather(2, index.long()[:, None].expand(-1, flat.shape[1], -1))  # (B, C, N)
            total = total + read * (across * down * inside)[:, None]
    return total


def convolutional_spatial_transformer(features: Tensor, affine: Tensor, *, kernel_size: int = 3) -> Tensor:
    """Cut the patch around every place of a feature map in a frame of its own: turned, scaled, sheared and shifted.

    A spatial transformer ({cite}`jaderberg2015`, §3) for each patch rather than for the image, as the Universal
    Correspondence Network has it ({cite}`choy2016`). Tap (u, v) of the k × k patch at (x, y), u and v counted from the
    patch's middle, reads the map at (x, y) + A (u, v, 1)ᵀ, bilinearly, and 0 outside. The patches lie side by side, so
    that a convolution with kernel k and stride k applies its filter to each in its own frame.

    Args:
        features: (B, C, H, W) float.
        affine: (B, 2, 3, H, W): A for each place, in pixels, x before y; [[1, 0, 0], [0, 1, 0]] is no change.
        kernel_size: k.
    Returns:
        (B, C, kH, kW), dtype of features; half precision is computed in float32. Differentiable in both arguments, in
        the transformation wherever no tap falls on a pixel's middle.
    Raises:
        ValueError: shapes or types that do not match, NaN in the transformation.
    Cost: O(k²CHW) time and memory.
    """
    batch, _, height, width = check_tensor("features", features, "B C H W").shape
    wanted = (batch, 2, 3, height, width)
    if check_tensor("affine", affine, "B 2 3 H W").shape != wanted:
        raise mismatch("affine", f"(B, 2, 3, H, W) = {wanted}", tensor_shape(affine))
    if affine.dtype != features.dtype:
        raise mismatch("affine", f"{describe_dtype(features)}, the type of features", describe_dtype(affine))
    check_no_nan("affine", affine)
    k = check_count("kernel_size", kernel_size)
    work, device = working_type(features), features.device
    taps = torch.arange(k, device=device, dtype=work) - (k - 1) / 2
    # Places along the first two axes, taps along the last two: (B, H, W, k, k), v (down) before u (across).
    A = affine.to(work).movedim((3, 4), (1, 2))[..., None, None]  # (B, H, W, 2, 3, 1, 1)
    u, v = taps, taps[:, None]
    x = torch.arange(width, device=device)[:, None, None] + (A[..., 0, 0, :, :] * u + A[..., 0, 1, :, :] * v)
    y = torch.arange(height, device=device)[:, None, None, None] + (A[..., 1, 0, :, :] * u + A[..., 1, 1, :, :] * v)
    x, y = x + A[..., 0, 2, :, :], y + A[..., 1, 2, :, :]
    read = _sample(features.to(work), x.flatten(1), y.flatten(1)).unflatten(-1, (height, width, k, k))
    return read.transpose(3, 4).flatten(4).flatten(2, 3).to(features.dtype)  # (B, C, H, k, W, k) → (B, C, kH, kW)


def soft_match(source: Tensor, target: Tensor, *, scale: float = 20.0, target_mask: Tensor | None = None) -> Tensor:
    """Say where each place of one feature map lies in another: attention whose values are positions.

    Weights softmax(scale · cos(fₛ, fₜ)) over the target's places; the match is their mean position, a soft argmax
    ({cite}`kendall2017`, §3.4), differentiable where the nearest neighbour of {cite}`choy2016` is not. As the scale
    grows it becomes that neighbour. A mean lies between two equally good matches: where no feature stands out, the
    answer is the middle.

    Args:
        source: (B, C, H, W) float.
        target: (B, C, H', W').
        scale: factor of the cosines, an inverse temperature.
        target_mask: (B, H', W') bool; True = may be matched.
    Returns:
        (B, 2, H, W), dtype of source: x and y in the target, in pixels counted from 0; (0, 0) where nothing may be
        matched.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    Cost: O(HW · H'W' · C) time, O(HW · H'W') memory.
    """
    batch, channels, height, width = check_tensor("source", source, "B C H W").shape
    rows, columns = check_tensor("target", target, "B C H' W'").shape[2:]
    if target.shape[:2] != source.shape[:2]:
        raise mismatch("target", f"(B, C) = {(batch, channels)}, those of source", tensor_shape(target))
    if target.dtype != source.dtype:
        raise mismatch("target", f"{describe_dtype(source)}, the type of source", describe_dtype(target))
    check_no_nan("source", source)
    check_no_nan("target", target)
    if target_mask is not None:
        target_mask = check_mask("target_mask", target_mask, (batch, rows, columns), "B H' W'")
        target_mask = target_mask.expand(batch, rows, columns).flatten(1)[:, None]  # (B, 1, H'·W')
    work = working_type(source)
    f, g = (m.to(work).flatten(2).transpose(1, 2) for m in (source, target))  # (B, H·W, C), (B, H'·W', C)
    weights = softmax(cosine(f, g) * scale, mask=target_mask)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([x, y], -1).flatten(0, 1).to(weights)  # (H'·W', 2)
    return (weights @ places).transpose(1, 2).unflatten(-1, (height, width)).to(source.dtype)
