"""Normalisers: functions from scores to attention weights.

Each is called as ``normalizer(scores, *, mask=None, dim=-1, …)``. A score of −∞ and a position where the mask is False
mean the same: no weight there. A row with nothing left gets zero weights and sends no gradient back, in every
normaliser and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.shapes import (
    check_choice,
    check_mask,
    check_no_nan,
    check_tensor,
    describe,
    mismatch,
    values_are_readable,
)

Normalizer = Callable[..., Tensor]


def _prepare(scores: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Check the arguments; return scores with −∞ at masked positions, and which rows are empty (None: no row is).

    Empty rows come back filled with zeros: whatever a normaliser makes of them is finite, and is then overwritten.
    """
    check_tensor("scores", scores, "...")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -scores.dim() <= dim < scores.dim():
        raise mismatch("dim", f"an axis of scores, in [{-scores.dim()}, {scores.dim() - 1}]", dim)
    if mask is not None:
        scores = scores.masked_fill(~check_mask("mask", mask, scores.shape, "*scores.shape"), -math.inf)
    check_no_nan("scores", scores)
    top = scores.detach().amax(dim, keepdim=True)
    if values_are_readable(scores):
        if top.max() == math.inf:
            raise mismatch("scores", "finite values or −inf", "+inf")
        if top.min() > -math.inf:
            return scores, None
    empty = top == -math.inf
    return scores.masked_fill(empty, 0.0), empty


def _clear(weights: Tensor, empty: Tensor | None) -> Tensor:
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def _log_allowed(scores: Tensor, dim: int, *, least: int = 1) -> Tensor:
    """Return the logarithm of how many positions each row may attend to, taken as ``least`` where fewer: (…, 1, …)."""
    return (scores > -math.inf).sum(dim, keepdim=True).clamp(min=least).to(scores.dtype).log()


def _widen(scores: Tensor) -> Tensor:
    """Turn half precision into float32, where scores are shifted, multiplied or counted."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _rescale(scores: Tensor, factor: Tensor) -> Tensor:
    """Multiply the scores, leaving −∞ as it is whatever the factor: 0 · −∞ would be NaN."""
    kept = scores > -math.inf
    return (scores.masked_fill(~kept, 0.0) * factor).masked_fill(~kept, -math.inf)


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
    scores, empty = _prepare(scores, mask, dim)
    return _clear(torch.softmax(scores, dim), empty)


def softmax_off_by_one(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Softmax with one more, silent, position of score 0: exp(zᵢ) / (1 + Σⱼ exp(zⱼ)) ({cite}`miller2023`).

    A head may so attend to nothing: where all scores are very negative, the weights sum to nearly 0.

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; rows sum to less than 1.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    scores, empty = _prepare(scores, mask, dim)
    silent = torch.zeros_like(scores.narrow(dim, 0, 1))
    weights = torch.softmax(torch.cat([scores, silent], dim), dim)
    return _clear(weights.narrow(dim, 0, scores.shape[dim]), empty)


def scalable_softmax(
    scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, strength: float | Tensor = 1.0
) -> Tensor:
    """Sharpen softmax as positions become more: softmax(s · log n · z) ({cite}`nakanishi2025`, eq. 2).

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
    scores, empty = _prepare(scores, mask, dim)
    wide = _widen(scores)
    factor = strength * _log_allowed(wide, dim)
    return _clear(torch.softmax(_rescale(wide, factor), dim).to(scores.dtype), empty)


def adaptive_temperature(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Sharpen softmax where it is dispersed, without training ({cite}`velickovic2025`, fig. 5 and the code beside it).

    The entropy H of softmax(z), in nats, sets an inverse temperature: 1 where H ≤ 0.5, else the larger of 1 and the
    authors' fitted polynomial −0.037 H⁴ + 0.481 H³ − 2.3 H² + 4.917 H − 1.791. Meant for inference with a trained
    model.

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    scores, empty = _prepare(scores, mask, dim)
    wide = _widen(scores)
    weights = torch.softmax(wide, dim)
    entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(dim, keepdim=True)
    fitted = (((-0.037 * entropy + 0.481) * entropy - 2.3) * entropy + 4.917) * entropy - 1.791
    sharpness = torch.where(entropy > 0.5, fitted.clamp(min=1.0), 1.0)
    return _clear(torch.softmax(_rescale(wide, sharpness), dim).to(scores.dtype), empty)


def sigmoid(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, offset: float | None = None) -> Tensor:
    """Weigh every position on its own: σ(zᵢ + b), with b = −log n unless given ({cite}`ramapuram2025`).

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
    scores, empty = _prepare(scores, mask, dim)
    offset = -math.log(scores.shape[dim]) if offset is None else offset
    return _clear(torch.sigmoid(_widen(scores) + offset).to(scores.dtype), empty)


class _Entmax(torch.autograd.Function):
    """α-entmax along the last axis, by Newton's method on its threshold.

    The weights are p(τ) = max((α−1)z − τ, 0)^(1/(α−1)) with τ such that they sum to 1. For 1 < α ≤ 2 the sum is convex
    and decreasing in τ, so Newton's steps from τ = max − 1, where the sum is at least 1, climb to the root without
    passing it. For α > 2 it is not convex: there we halve an interval.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, alpha: float) -> Tensor:
        z = scores.double() if scores.dtype == torch.float64 else scores.float()
        z = (z - z.amax(-1, keepdim=True)) * (alpha - 1)
        exponent = 1 / (alpha - 1)
        solve = _newton if alpha <= 2 else _bisect
        weights = (z - solve(z, exponent)).clamp(min=0).pow(exponent)
        weights = (weights / weights.sum(-1, keepdim=True)).to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.alpha = alpha
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        slope = torch.where(weights > 0, weights.pow(2 - ctx.alpha), 0)  # the Jacobian is diag(s) − s sᵀ / Σ s
        weighted = slope * grad
        return weighted - slope * (weighted.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)), None


def _newton(z: Tensor, exponent: float) -> Tensor:
    tau = torch.full_like(z[..., :1], -1.0)
    tolerance = 4 * torch.finfo(z.dtype).eps
    for _ in range(60):
        gap = (z - tau).clamp(min=0)
        slope = gap.pow(exponent - 1) if exponent > 1 else (gap > 0).to(z.dtype)
        step = ((gap * slope).sum(-1, keepdim=True) - 1) / (exponent * slope.sum(-1, keepdim=True))
        tau = tau + step.clamp(min=0)
        if values_are_readable(step) and step.max() <= tolerance:
            break
    return tau


def _bisect(z: Tensor, exponent: float) -> Tensor:
    low = torch.full_like(z[..., :1], -1.0)  # here the largest weight alone is 1
    high = torch.full_like(low, -(z.shape[-1] ** (-1 / exponent)))  # here the largest weight is 1/n
    for _ in range(60):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(exponent).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low


def entmax(scores: Tensor, alpha: float = 1.5, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Maximise p·z plus Tsallis's α-entropy of p over the simplex ({cite}`peters2019`, eq. 10).

    Between softmax (α = 1) and sparsemax (α = 2), and beyond; for α > 1 low scores get exactly zero weight. The
    Jacobian is diag(s) − s sᵀ / Σ s with sᵢ = pᵢ^(2−α) on the support and 0 elsewhere.

    Args:
        scores: any shape, floating; half precision is computed in float32.
        alpha: α ≥ 1.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: α below 1, and as for :func:`softmax`.
    Cost: O(n) a step of Newton's method, usually 5 to 10 steps; the paper sorts, O(n log n).
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1 <= alpha < math.inf:
        raise mismatch("alpha", "a finite number ≥ 1", describe(alpha))
    if alpha == 1:
        return softmax(scores, mask=mask, dim=dim)
    scores, empty = _prepare(scores, mask, dim)
    weights = _Entmax.apply(scores.movedim(dim, -1), float(alpha)).movedim(-1, dim)
    return _clear(weights, empty)


def entmax15(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Apply :func:`entmax` with α = 1.5 ({cite}`peters2019`).

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    return entmax(scores, 1.5, mask=mask, dim=dim)


def sparsemax(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Project the scores onto the simplex: the p nearest to z in the Euclidean sense ({cite}`martins2016`, eq. 1).

    Differs from the paper's algorithm 1, which sorts: the threshold is found by Newton's method (:func:`entmax` with α
    = 2).

    Args:
        scores: any shape, floating.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: as for :func:`softmax`.
    """
    return entmax(scores, 2.0, mask=mask, dim=dim)


def asentmax(
    scores: Tensor,
    alpha: float = 1.5,
    *,
    mask: Tensor | None = None,
    dim: int = -1,
    delta: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    gamma: float | Tensor = 1.0,
) -> Tensor:
    """Apply :func:`entmax` with a scale that grows with the number of positions: α-entmax((δ + β (log n)^γ) z).

    Adaptive-scalable entmax ({cite}`vasylenko2026`). In the authors' code β and γ are computed from each token's hidden
    state, β by a softplus and γ by a scaled tanh; here they are arguments, so that any parametrisation can be used.

    Args:
        scores: any shape, floating.
        alpha: α ≥ 1.
        mask: bool, broadcastable to scores; True = may attend.
        dim: the axis to normalise; n is the number of positions allowed in the row.
        delta: δ, a number or a tensor that broadcasts to scores with size 1 along ``dim``.
        beta: β, likewise.
        gamma: γ, likewise.
    Returns:
        Same shape and dtype; each row sums to 1, or to 0 where it is empty.
    Raises:
        ValueError: as for :func:`entmax`.
    """
    prepared, empty = _prepare(scores, mask, dim)
    # A lone position gets weight 1 whatever its factor, but (log 1)^γ is infinite for γ < 0: count it as two.
    wide = _widen(prepared)
    factor = delta + beta * _log_allowed(wide, dim, least=2) ** gamma
    return _clear(entmax(_rescale(wide, factor), alpha, dim=dim).to(prepared.dtype), empty)


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": softmax,
    "softmax_off_by_one": softmax_off_by_one,
    "scalable_softmax": scalable_softmax,
    "adaptive_temperature": adaptive_temperature,
    "sigmoid": sigmoid,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax": entmax,
    "asentmax": asentmax,
}


def resolve(normalizer: str | Normalizer) -> Normalizer:
    """Return the normaliser of that name, or the callable itself.

    Args:
        normalizer: a name, or a function called as ``(scores, *, mask) -> weights``.
    Raises:
        ValueError: a name that is not in ``NORMALIZERS``.
    """
    if callable(normalizer):
        return normalizer
    return NORMALIZERS[check_choice("normalizer", normalizer, tuple(NORMALIZERS))]
