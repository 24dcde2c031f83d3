"""Modern Hopfield networks: attention as the retrieval of stored patterns, one step of descent on an energy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbook.mechanisms.common import working_type
from attnbook.normalizers import softmax
from attnbook.shapes import check_count, check_no_nan, check_tensor, describe, describe_dtype, mismatch, tensor_shape


def _check(state: Tensor, patterns: Tensor, beta: float) -> None:
    check_tensor("state", state, "... D")
    check_tensor("patterns", patterns, "M D")
    if patterns.shape[1] != state.shape[-1]:
        raise mismatch("patterns", f"last axis D = {state.shape[-1]}, that of state", tensor_shape(patterns))
    if patterns.dtype != state.dtype:
        raise mismatch("patterns", f"{describe_dtype(state)}, the type of state", describe_dtype(patterns))
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
        raise mismatch("beta", "a finite number > 0", describe(beta))
    check_no_nan("state", state)
    check_no_nan("patterns", patterns)


def hopfield_energy(state: Tensor, patterns: Tensor, *, beta: float) -> Tensor:
    """Measure how far states are from what is stored: each retrieval step lowers it, or leaves it where it is.

    E(ξ) = −(1/β) log Σₘ exp(β xₘ·ξ) + ½ ξ·ξ + (1/β) log M + ½ maxₘ xₘ·xₘ ({cite}`ramsauer2021`, eq. 2). The last two
    terms are constant in the state, and make the energy non-negative.

    Args:
        state: (…, D) float: ξ.
        patterns: (M, D): the rows are the xₘ.
        beta: β > 0, the inverse temperature.
    Returns:
        (…), dtype of state; half precision is computed in float32.
    Raises:
        ValueError: shapes or types that do not match, NaN, β not positive.
    """
    _check(state, patterns, beta)
    work = working_type(state)
    wide, stored = state.to(work), patterns.to(work)
    overlap = torch.logsumexp(beta * (wide @ stored.T), -1) - math.log(len(stored))  # (…)
    radius = stored.square().sum(-1).max()
    return (0.5 * (wide.square().sum(-1) + radius) - overlap / beta).to(state.dtype)


def hopfield_retrieve(state: Tensor, patterns: Tensor, *, beta: float, steps: int = 1) -> Tensor:
    """Pull states towards the stored patterns that they resemble.

    Each step is ξ ← Xᵀ softmax(β X ξ), X the (M, D) patterns ({cite}`ramsauer2021`, eq. 3): attention whose keys and
    values are the patterns and whose scale is β. It never raises :func:`hopfield_energy`.

    Args:
        state: (…, D) float: where the retrieval starts.
        patterns: (M, D), what is stored.
        beta: β > 0; large values retrieve one pattern, small ones an average of several.
        steps: how many updates; one is nearly always enough for patterns well apart (their theorem 4).
    Returns:
        (…, D), dtype of state; half precision is computed in float32 through all steps.
    Raises:
        ValueError: shapes or types that do not match, NaN, β not positive, no step.
    Cost: O(steps · NMD) time and O(NM) memory for N states.
    """
    _check(state, patterns, beta)
    check_count("steps", steps)
    work = working_type(state)
    found, stored = state.to(work), patterns.to(work)
    for _ in range(steps):
        found = softmax(beta * (found @ stored.T)) @ stored  # (…, M) @ (M, D)
    return found.to(state.dtype)
