"""Attention whose state decays as a whole: Mamba-2's state-space duality, and retention as its constant case."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.mechanisms.matrix_state import attend_by_state
from attnbook.shapes import check_attention, check_count, describe, mismatch, values_are_readable


def ssd_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
    form: str = "chunked",
    chunk_size: int = 64,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory that each token lets decay and then adds to: attention under a 1-semiseparable mask.

    The state-space duality of {cite}`dao2024b`. Recurrent: S ← exp(a) S + k vᵀ, o = Sᵀ q. Parallel, the dual quadratic
    form: O = (L ∘ Q Kᵀ) V, where L has at (i, j) the exponential of a summed over the tokens j + 1 … i. Chunked, the
    SSD algorithm: the quadratic form inside a chunk, the recurrence from chunk to chunk. Always causal.

    In the paper's terms query is C, key is B, value is Δ x and ``log_decay`` is Δ A. Differs from the paper: the step
    Δ, the skip D x, the convolution and the gate belong to the layer; its heads share one B and one C (our ``expand``),
    ours may also be grouped as in grouped-query attention.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D); as many positions as query.
        value: (B, Hkv, L, Dv).
        log_decay: broadcastable to (B, H, L), float, ≤ 0; −∞ makes the token forget all that came before it.
        attn_mask: broadcastable to (B, H, 1, L), bool; a position that is False neither writes nor decays the state.
        scale: factor of the scores; the paper has none.
        form: "parallel", "chunked" or "recurrent"; all compute the same.
        chunk_size: tokens of a chunk.
        state: (B, H, D, Dv), what an earlier call returned: this call continues its sequence.
        return_state: return the state after the last token too.
    Returns:
        (B, H, L, Dv), dtype of query; with return_state also the state (B, H, D, Dv), float32, or float64 if query is.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, a mask that differs from query to query, NaN, a log_decay
            above 0, an unknown form, a chunk_size below 1.
    Cost: parallel O(L²D) time, O(L²) memory; chunked, with C tokens a chunk, O(LCD + LD²) time and O(LC + LD²/C)
    memory; recurrent O(LD²) time and O(D²) memory (O(LD²) if gradients are wanted).
    """
    return attend_by_state(
        query,
        key,
        value,
        log_decay=log_decay,
        decay_axes="B H L",
        scale=scale,
        attn_mask=attn_mask,
        form=form,
        chunk_size=chunk_size,
        state=state,
        return_state=return_state,
    )


def retention_gammas(heads: int) -> Tensor:
    """Return the decays of RetNet's heads, 1 − 2^(−5−h) for h = 0, 1, … ({cite}`sun2023`, §2.2).

    Args:
        heads: H.
    Returns:
        (H,) float64, from 31/32 upwards.
    Raises:
        ValueError: heads below 1.
    """
    return 1 - 0.5 ** (5 + torch.arange(check_count("heads", heads), dtype=torch.float64))


def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory that decays at a fixed rate in each head: retention.

    {cite}`sun2023`, §2.1: o_n = Σ_m γ^(n−m) (q_n · k_m) v_m over m ≤ n, the constant case of :func:`ssd_attention`.
    Always causal.

    Differs from the paper: queries and keys come as they are, where its layer first rotates them (rotation and decay
    together are xPos): apply :class:`attnbook.positions.RotaryEmbedding` beforehand. Of its three score normalisations
    we have the first, the scale 1/√D. The other two, divisions of a row of scores by √(Σ_m γ^(n−m)) and by the size of
    its sum, if that is above 1, give each output a positive factor, which the layer's group normalisation takes out
    again; they and it are left to the layer.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D); as many positions as query.
        value: (B, Hkv, L, Dv).
        gamma: (H,) float, in (0, 1]; by default those of :func:`retention_gammas`.
        attn_mask: broadcastable to (B, H, 1, L), bool; a position that is False neither writes nor decays the state.
        scale: factor of the scores; 1/√D by default.
        form: "parallel", "chunked" or "recurrent"; all compute the same.
        chunk_size: tokens of a chunk.
        state: (B, H, D, Dv), what an earlier call returned: this call continues its sequence.
        return_state: return the state after the last token too.
    Returns:
        (B, H, L, Dv), dtype of query; with return_state also the state (B, H, D, Dv), float32, or float64 if query is.
    Raises:
        ValueError: as :func:`ssd_attention`; gamma of another shape or outside (0, 1].
    Cost: that of :func:`ssd_attention`.
    """
    shape = check_attention(query, key, value)
    gamma = retention_gammas(shape.H).to(query.device) if gamma is None else _check_gamma(gamma, shape.H)
    return ssd_attention(
        query,
        key,
        value,
        gamma.log()[:, None],
        attn_mask=attn_mask,
        scale=shape.D**-0.5 if scale is None else scale,
        form=form,
        chunk_size=chunk_size,
        state=state,
        return_state=return_state,
    )


def _check_gamma(gamma: Tensor, heads: int) -> Tensor:
    if not isinstance(gamma, Tensor) or not gamma.is_floating_point() or gamma.shape != (heads,):
        raise mismatch("gamma", f"a floating tensor (H,) = {(heads,)}", describe(gamma))
    if values_are_readable(gamma) and not ((gamma > 0) & (gamma <= 1)).all():
        raise mismatch("gamma", "numbers in (0, 1]", str([round(x, 6) for x in gamma.tolist()]))
    return gamma
