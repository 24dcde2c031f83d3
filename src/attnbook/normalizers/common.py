"""What the normalisers have in common: checks, empty rows, and scores that are multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnbook.shapes import check_mask, check_no_nan, check_tensor, mismatch, values_are_readable

Normalizer = Callable[..., Tensor]


def prepare(scores: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Check the arguments of a normaliser, and apply its mask.

    Args:
        scores: what the caller passed.
        mask: what the caller passed.
        dim: what the caller passed.
    Returns:
        The scores with −∞ at masked positions, and the largest of each row, detached, with size 1 along ``dim``.
    Raises:
        ValueError: no floating tensor, an empty axis, NaN or +∞ among the scores, a mask that is not boolean or does
            not broadcast, an axis that there is not.
    """
    check_tensor("scores", scores, "...")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -scores.dim() <= dim < scores.dim():
        raise mismatch("dim", f"an axis of scores, in [{-scores.dim()}, {scores.dim() - 1}]", dim)
    if mask is not None:
        scores = scores.masked_fill(~check_mask("mask", mask, scores.shape, "*scores.shape"), -math.inf)
    top = scores.detach().amax(dim, keepdim=True)
    if values_are_readable(scores) and not top.max() < math.inf:  # the largest is NaN where any score is
        check_no_nan("scores", scores)
        raise mismatch("scores", "finite values or −inf", "+inf")
    return scores, top


def fill_empty(scores: Tensor, top: Tensor) -> tuple[Tensor, Tensor | None]:
    """Fill empty rows with zeros: whatever a normaliser makes of them is finite, and is then overwritten.

    Args:
        scores: with −∞ at masked positions.
        top: the largest of each row.
    Returns:
        The scores, and which rows are empty; None where it is known that no row is.
    """
    if values_are_readable(scores) and top.min() > -math.inf:
        return scores, None
    empty = top == -math.inf
    return scores.masked_fill(empty, 0.0), empty


def clear(weights: Tensor, empty: Tensor | None) -> Tensor:
    """Set the weights of empty rows to zero.

    Args:
        weights: of all rows.
        empty: which rows are empty, or None.
    """
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def log_allowed(scores: Tensor, dim: int, *, least: int = 1) -> Tensor:
    """Return the logarithm of how many positions each row may attend to.

    Args:
        scores: with −∞ at masked positions.
        dim: the axis of the positions.
        least: the number taken where there are fewer.
    Returns:
        Of the scores' type, with size 1 along ``dim``.
    """
    return (scores > -math.inf).sum(dim, keepdim=True).clamp(min=least).to(scores.dtype).log()


def widen(scores: Tensor) -> Tensor:
    """Turn half precision into float32, where scores are shifted, multiplied or counted.

    Args:
        scores: any.
    """
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def rescale(scores: Tensor, factor: Tensor) -> Tensor:
    """Multiply the scores, leaving −∞ as it is whatever the factor: 0 · −∞ would be NaN.

    Args:
        scores: with −∞ at masked positions.
        factor: broadcasts to the scores.
    """
    kept = scores > -math.inf
    return (scores.masked_fill(~kept, 0.0) * factor).masked_fill(~kept, -math.inf)
