"""Hard attention: look at one key, drawn at random, and two ways to learn where to look."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.mechanisms.common import naive_scores
from attnbook.normalizers import softmax
from attnbook.shapes import check_broadcastable, check_tensor, describe, mismatch


def sample_one_hot(weights: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one key for each query, with the weights as probabilities.

    Args:
        weights: (…, L, S), rows that sum to 1, or to 0 where there is nothing to attend to.
        generator: of the random numbers.
    Returns:
        (…, L, S), dtype of the weights: a single one in each row; an empty row stays empty. Without gradient.
    Raises:
        ValueError: no floating tensor, or negative weights.
    """
    check_tensor("weights", weights, "... L S")
    rows = weights.detach().reshape(-1, weights.shape[-1])
    if rows.min() < 0:
        raise mismatch("weights", "no negative number", f"{rows.min().item():.3g}")
    seen = rows.sum(-1, keepdim=True) > 0
    probability = rows.where(seen, 1.0).to(torch.promote_types(rows.dtype, torch.float32))
    picked = torch.multinomial(probability, 1, generator=generator)
    one_hot = torch.zeros_like(rows).scatter_(-1, picked, 1.0) * seen
    return one_hot.view(weights.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, picked):
        return picked.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def straight_through(weights: Tensor, picked: Tensor) -> Tensor:
    """Return what was picked, but send the gradient to the weights as if they had been used ({cite}`bengio2013`).

    Args:
        weights: (…, L, S).
        picked: (…, L, S), from :func:`sample_one_hot`.
    Returns:
        (…, L, S), equal to ``picked``.
    Raises:
        ValueError: shapes that differ.
    """
    _check_picked(weights, picked)
    return _StraightThrough.apply(weights, picked)


def reinforce_surrogate(weights: Tensor, picked: Tensor, loss: Tensor, *, baseline: Tensor | float = 0.0) -> Tensor:
    """Return a term whose gradient estimates how the expected loss depends on the weights ({cite}`williams1992`).

    It is (loss − baseline) · log p(picked) with the factor held constant; its value means nothing. Add it to the loss,
    whose own gradient covers everything but the choice.

    Args:
        weights: (…, L, S), the probabilities.
        picked: (…, L, S), drawn from them.
        loss: broadcastable to (…, L): what each choice led to.
        baseline: a number, or broadcastable to (…, L); any value that does not depend on the choice leaves the
            estimate unbiased.
    Returns:
        (…, L); zero for empty rows.
    Raises:
        ValueError: shapes that do not match.
    """
    _check_picked(weights, picked)
    for name, tensor in (("loss", loss), ("baseline", baseline)):
        if isinstance(tensor, Tensor):
            check_broadcastable(name, tensor, weights.shape[:-1], "... L")
    chosen = (weights * picked).sum(-1)
    empty = picked.sum(-1) == 0
    advantage = torch.as_tensor(loss - baseline, dtype=weights.dtype, device=weights.device).detach()
    return advantage * chosen.masked_fill(empty, 1.0).log()


def _check_picked(weights: Tensor, picked: Tensor) -> None:
    check_tensor("weights", weights, "... L S")
    if not isinstance(picked, Tensor) or picked.shape != weights.shape:
        raise mismatch("picked", f"a tensor of shape {tuple(weights.shape)}, that of weights", describe(picked))


def hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return one value for each query, drawn with the weights of softmax attention as probabilities.

    {cite}`xu2015`, §4.1. Differs from the paper: the gradient is the :func:`straight_through` one; for REINFORCE take
    :func:`sample_one_hot` and :func:`reinforce_surrogate`. Chapter: {ref}`sec-01-alignment`.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
        generator: of the random numbers.
    Returns:
        (B, H, L, Dv), dtype of query: each row is one of the values, or zero where there is nothing to attend to.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    Cost: O(LSD) time, O(LS) memory.
    """
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    weights = softmax(scores, mask=mask)
    picked = sample_one_hot(weights, generator=generator)
    return (straight_through(weights, picked) @ value).to(query.dtype)
