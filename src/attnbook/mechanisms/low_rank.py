"""Low-rank attention: keys mixed into a few, or pairs scored through a few landmarks."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, never_causal, widen, working_type
from attnbook.normalizers import softmax
from attnbook.scores import scaled_dot
from attnbook.shapes import AttentionShape, check_count, check_no_nan, check_tensor, mismatch, tensor_shape

CAUSAL_INSTEAD = "linear_attention, performer_attention, random_feature_attention, cosformer_attention"


def _checked_mixture(name: str, mixture: Tensor, shape: AttentionShape, dtype: torch.dtype) -> Tensor:
    check_tensor(name, mixture, "... k S")
    if mixture.dim() > 3 or mixture.shape[-1] != shape.S or mixture.shape[:-2] not in ((), (1,), (shape.H,)):
        raise mismatch(name, f"(k, S) or (H, k, S) with H = {shape.H}, S = {shape.S}", tensor_shape(mixture))
    return check_no_nan(name, mixture).to(dtype)


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    projection_key: Tensor | None = None,
    projection_value: Tensor | None = None,
    projected_length: int = 64,
    generator: Generator | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Mix the S keys and values into k of each, and attend to these.

    Computes softmax(Q (E K)ᵀ · scale) (F V)  {cite}`wang2020`, with E and F of shape k × S; they are learned there,
    and so bound to one length of sequence. Exact where E and F are the identity. A mask sets masked keys and values to
    zero before they are mixed: they add nothing, but a mixture of nothing still gets its share of the softmax.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        projection_key: E, (k, S) or (H, k, S); by default random, normal with variance 1/S, so that mixed keys
            are as long as the keys were.
        projection_value: F, likewise; E by default, as where the paper shares them.
        projected_length: k, where no E is given.
        generator: of random numbers, where no E is given.
        attn_mask: of keys, broadcastable to (B, H, 1, S), bool; True = may be attended to.
        is_causal: must be False: each mixture holds later keys, too.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes, types or counts that do not fit; a causal call; NaN in query, key, E or F.
    Cost: O((L + S)·k·(D + Dv)) time, O(Lk + Sk) memory.
    """
    never_causal(is_causal, CAUSAL_INSTEAD)
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    dtype = working_type(query)
    check_count("projected_length", projected_length)
    if projection_key is None:
        drawn = torch.randn(projected_length, shape.S, generator=generator, dtype=torch.float64)
        projection_key = (drawn * shape.S**-0.5).to(query.device, dtype)
    mix_keys = _checked_mixture("projection_key", projection_key, shape, dtype)
    mix_values = mix_keys
    if projection_value is not None:
        mix_values = _checked_mixture("projection_value", projection_value, shape, dtype)
        if mix_values.shape[-2] != mix_keys.shape[-2]:
            expected = f"k = {mix_keys.shape[-2]} rows, as many as projection_key has"
            raise mismatch("projection_value", expected, tensor_shape(projection_value))
    key, value = widen(key, shape), widen(value, shape)
    if mask is not None:
        key, value = key.masked_fill(~mask.mT, 0.0), value.masked_fill(~mask.mT, 0.0)
    scores = scaled_dot(query.to(dtype), mix_keys @ key, scale=scale)  # (B, H, L, k)
    return (torch.softmax(scores, -1) @ (mix_values @ value)).to(query.dtype)


def segments(num_landmarks: int, length: int, mask: Tensor | None, like: Tensor) -> Tensor:
    """Divide positions into m runs, as equal as can be, and return what averages each.

    The r-th of n allowed positions, counted from 0, is in run ⌊r m / n⌋.

    Args:
        num_landmarks: m.
        length: of the sequence.
        mask: (…, 1, length), bool, or None: which positions are allowed.
        like: gives type and device.
    Returns:
        (m, length), or (…, m, length): rows sum to 1, or to 0 where a run is empty because n < m.
    """
    allowed = torch.ones(1, length, dtype=torch.bool, device=like.device) if mask is None else mask
    allowed = allowed.expand(*allowed.shape[:-1], length)
    rank = allowed.cumsum(-1) - 1
    run = rank * num_landmarks // allowed.sum(-1, keepdim=True).clamp(min=1)  # (…, 1, length)
    member = (run == torch.arange(num_landmarks, device=like.device)[:, None]) & allowed  # (…, m, length)
    return member.to(like.dtype) / member.sum(-1, keepdim=True).clamp(min=1)


def iterative_pseudo_inverse(matrix: Tensor, num_iterations: int = 6) -> Tensor:
    """Approach the pseudo-inverse by products alone.

    Z ← Z (13 I − A Z (15 I − A Z (7 I − A Z))) / 4 from Z = Aᵀ / (‖A‖₁ ‖A‖∞)  {cite}`xiong2021`. It converges
    with the third power of the error once A Z is near the projection onto the range of A; before that, each step gains
    a factor of about 13/4 on the smallest singular value, so that a matrix of condition κ needs about
    2 log κ / log 3.25 steps.

    Args:
        matrix: A, (…, m, m).
        num_iterations: steps.
    Returns:
        (…, m, m).
    Raises:
        ValueError: fewer than 1 step.
    """
    check_count("num_iterations", num_iterations)
    size = matrix.abs()
    norms = size.sum(-2).amax(-1) * size.sum(-1).amax(-1)  # (…,)
    inverse = matrix.mT / torch.where(norms == 0, 1.0, norms)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(num_iterations):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int = 64,
    num_iterations: int = 6,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Estimate softmax attention from its values at landmarks, the means of runs of queries and of keys.

    Computes softmax(Q K̄ᵀ) softmax(Q̄ K̄ᵀ)⁺ (softmax(Q̄ Kᵀ) V), all scores scaled  {cite}`xiong2021`, algorithm 1,
    the pseudo-inverse by :func:`iterative_pseudo_inverse`. Exact with a landmark at every position, as far as that
    inverse has converged. Differs from the paper: lengths need not be multiples of the number of landmarks, nor equal;
    runs are made of allowed keys only; the first inverse is scaled for each matrix by itself (the authors' code takes
    the largest norm of the batch, so that there a sequence's output depends on its neighbours); there is no convolution
    of the values beside it.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        num_landmarks: m; no more than L or S are used. Where fewer keys are allowed, they have fewer landmarks.
        num_iterations: steps of the pseudo-inverse. More are not always better: where the matrix of the landmarks is
            nearly singular, its true inverse magnifies what they miss, and few steps leave that out.
        attn_mask: of keys, broadcastable to (B, H, 1, S), bool; True = may be attended to.
        is_causal: must be False: a landmark is a mean over later positions, too.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes, types or counts that do not fit; a causal call; NaN in query or key.
    Cost: O((L + S)·m·(D + Dv) + i·m³) time with i steps, O((L + S)·m + i·m²) memory.
    """
    never_causal(is_causal, CAUSAL_INSTEAD)
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    check_count("num_landmarks", num_landmarks)
    check_count("num_iterations", num_iterations)
    m = min(num_landmarks, shape.L, shape.S)
    q, k, v = query.to(working_type(query)), widen(key, shape), widen(value, shape)
    mix_keys = segments(m, shape.S, mask, k)
    marks_q = segments(m, shape.L, None, q) @ q  # (B, H, m, D)
    marks_k = mix_keys @ k
    used = None if mask is None else mix_keys.sum(-1)[..., None, :] > 0  # (…, 1, m)
    left = softmax(scaled_dot(q, marks_k, scale=scale), mask=used)  # (B, H, L, m)
    middle = softmax(scaled_dot(marks_q, marks_k, scale=scale), mask=used)  # (B, H, m, m)
    right = softmax(scaled_dot(marks_q, k, scale=scale), mask=mask)  # (B, H, m, S)
    return (left @ (iterative_pseudo_inverse(middle, num_iterations) @ (right @ v))).to(query.dtype)
