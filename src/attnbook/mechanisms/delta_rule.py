"""The delta rule: a memory that is corrected, not only added to; with a decay, the gated delta rule."""

from __future__ import annotations

from torch import Tensor

from attnbook.mechanisms.matrix_state import attend_by_state


def delta_rule_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
    form: str = "chunked",
    chunk_size: int = 64,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory in which each token replaces what is stored under its key, by a share β, with its value.

    {cite}`schlag2021`: S ← S + β k (v − Sᵀk)ᵀ, o = Sᵀ q. That is one step of gradient descent, of rate β, on
    ½ ‖Sᵀk − v‖². Parallel over the tokens of a chunk by the WY representation and the UT transform
    ({cite}`yang2024b`); the parallel form is one chunk. With ``log_decay``, the gated delta rule
    ({cite}`yang2025`): the memory is first multiplied by exp(log_decay). Always causal.

    Stable while 0 ≤ β‖k‖² ≤ 2, so that I − β k kᵀ lengthens nothing: normalise the keys. The value is replaced whole
    where β‖k‖² = 1. Differs from the papers: feature maps and the normalisation of queries and keys belong to the
    layer; and the triangular system is solved, where {cite}`yang2024b` inverts its matrix.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D); as many positions as query.
        value: (B, Hkv, L, Dv).
        beta: broadcastable to (B, H, L), float, finite: how much of the error is corrected.
        log_decay: broadcastable to (B, H, L), float, ≤ 0; none by default; −∞ forgets all that came before the token.
        attn_mask: broadcastable to (B, H, 1, L), bool; a position that is False neither writes nor decays the state.
        scale: factor of the scores; the papers' formulas have none, the code of the later two has 1/√D.
        form: "parallel", "chunked" or "recurrent"; all compute the same.
        chunk_size: tokens of a chunk.
        state: (B, H, D, Dv), what an earlier call returned: this call continues its sequence.
        return_state: return the state after the last token too.
    Returns:
        (B, H, L, Dv), dtype of query; with return_state also the state (B, H, D, Dv), float32, or float64 if query is.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, a mask that differs from query to query, NaN, a beta that
            is not finite, a log_decay above 0, an unknown form, a chunk_size below 1.
    Cost: parallel O(L²D) time, O(L²) memory; chunked, with C tokens a chunk, O(LCD + LD²) time and O(LC + LD²/C)
    memory; recurrent O(LD²) time and O(D²) memory (O(LD²) if gradients are wanted).
    """
    return attend_by_state(
        query,
        key,
        value,
        log_decay=log_decay,
        decay_axes=None if log_decay is None else "B H L",
        beta=beta,
        delta=True,
        scale=scale,
        attn_mask=attn_mask,
        form=form,
        chunk_size=chunk_size,
        state=state,
        return_state=return_state,
    )
