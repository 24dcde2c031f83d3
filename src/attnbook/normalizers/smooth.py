"""The softmax family: every position gets some weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbook.normalizers.common import clear, fill_empty, log_allowed, prepare, rescale, widen


def softmax(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Exponentiate and divide by the sum: exp(zᵢ) / Σⱼ exp(zⱼ).

    Its Jacobian is diag(p) − p pᵀ. Chapter: {ref}`sec-02-scaled-dot-product`.

    Args:
        scores: any shape, floating; −∞ means "not this one".
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: NaN or +∞ among the scores, an empty axis, a mask that is not boolean or does not broadcast.
    """
    scores, empty = fill_empty(*prepare(scores, mask, dim))
    return clear(torch.softmax(scores, dim), empty)


def softmax_off_by_one(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Softmax with one more, silent, position of score 0: exp(zᵢ) / (1 + Σⱼ exp(zⱼ)) ({cite}`miller2023`).

    A head may so attend to nothing: where all scores are very negative, the weights sum to nearly 0. The Jacobian is
    softmax's, diag(p) − p pᵀ.

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; rows sum to less than 1.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    scores, empty = fill_empty(*prepare(scores, mask, dim))
    silent = torch.zeros_like(scores.narrow(dim, 0, 1))
    weights = torch.softmax(torch.cat([scores, silent], dim), dim)
    return clear(weights.narrow(dim, 0, scores.shape[dim]), empty)


def scalable_softmax(
    scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, strength: float | Tensor = 1.0
) -> Tensor:
    """Sharpen softmax as positions become more: softmax(s · log n · z) ({cite}`nakanishi2025`, eq. 2).

    The Jacobian is s · log n · (diag(p) − p pᵀ).

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
        strength: s, a number or a learned tensor that broadcasts to scores; n is the number of positions allowed in the
            row.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    scores, empty = fill_empty(*prepare(scores, mask, dim))
    wide = widen(scores)
    factor = strength * log_allowed(wide, dim)
    return clear(torch.softmax(rescale(wide, factor), dim).to(scores.dtype), empty)


def adaptive_temperature(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Sharpen softmax where it is dispersed, without training ({cite}`velickovic2025`, fig. 5 and the code beside it).

    The entropy H of softmax(z), in nats, sets an inverse temperature: 1 where H ≤ 0.5, else the larger of 1 and the
    authors' fitted polynomial −0.037 H⁴ + 0.481 H³ − 2.3 H² + 4.917 H − 1.791. Meant for inference with a trained
    model. With θ the inverse temperature and q = softmax(z), the Jacobian is (diag(p) − p pᵀ)(θ I + z ∇θᵀ), where
    ∇θ = −θ′(H) · q ∘ (log q + H), and 0 where θ is 1.

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    scores, empty = fill_empty(*prepare(scores, mask, dim))
    wide = widen(scores)
    weights = torch.softmax(wide, dim)
    entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(dim, keepdim=True)
    fitted = (((-0.037 * entropy + 0.481) * entropy - 2.3) * entropy + 4.917) * entropy - 1.791
    sharpness = torch.where(entropy > 0.5, fitted.clamp(min=1.0), 1.0)
    return clear(torch.softmax(rescale(wide, sharpness), dim).to(scores.dtype), empty)


def sigmoid(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, offset: float | None = None) -> Tensor:
    """Weigh every position on its own: σ(zᵢ + b), with b = −log n unless given ({cite}`ramapuram2025`).

    The Jacobian is diag(p ∘ (1 − p)).

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis that holds the n positions; it sets the default offset, nothing is summed over it.
        offset: b; −log n by default, n the length of the axis, so that a row of zeros sums to about 1.
    Returns:
        Same shape and dtype, each weight in [0, 1]; rows do not sum to 1.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    scores, empty = fill_empty(*prepare(scores, mask, dim))
    offset = -math.log(scores.shape[dim]) if offset is None else offset
    return clear(torch.sigmoid(widen(scores) + offset).to(scores.dtype), empty)
