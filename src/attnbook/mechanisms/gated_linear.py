"""Gated linear attention: each channel of the key forgets at a rate of its own, which the token sets."""

from __future__ import annotations

from torch import Tensor

from attnbook.mechanisms.matrix_state import attend_by_state


def gated_linear_attention(
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
    """Read a memory whose rows each token lets decay, each at its own rate, before it adds to them.

    {cite}`yang2024`: S ← Diag(exp a) S + k vᵀ, o = Sᵀ q, with a the vector ``log_decay``. Always causal, and not
    normalised.

    Differs from the paper: it keeps exponents bounded by a second level of chunks, with products between sub-chunks
    and, inside each, pairwise differences in log space, term by term. We halve the chunk down to single tokens, so that
    all pairs are scored by products, and take no differences, so that strong decays lose no digits. Its gate's formula,
    the normalisation and the output gate belong to the layer.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D); as many positions as query.
        value: (B, Hkv, L, Dv).
        log_decay: broadcastable to (B, H, L, D), float, ≤ 0; −∞ makes a channel forget all that came before the token.
        attn_mask: broadcastable to (B, H, 1, L), bool; a position that is False neither writes nor decays the state.
        scale: factor of the scores; the paper's formulas have none, its authors' code has 1/√D.
        form: "parallel", "chunked" or "recurrent"; all compute the same.
        chunk_size: tokens of a chunk; best a power of two.
        state: (B, H, D, Dv), what an earlier call returned: this call continues its sequence.
        return_state: return the state after the last token too.
    Returns:
        (B, H, L, Dv), dtype of query; with return_state also the state (B, H, D, Dv), float32, or float64 if query is.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, a mask that differs from query to query, NaN, a log_decay
            above 0, an unknown form, a chunk_size below 1.
    Cost: parallel O(L²D) time, O(L² + LD log L) memory; chunked, with C tokens a chunk, O(LCD + LD²) time and
    O(LC + LD²/C) memory; recurrent O(LD²) time and O(D²) memory (O(LD²) if gradients are wanted).
    """
    return attend_by_state(
        query,
        key,
        value,
        log_decay=log_decay,
        decay_axes="B H L D",
        scale=scale,
        attn_mask=attn_mask,
        form=form,
        chunk_size=chunk_size,
        state=state,
        return_state=return_state,
    )
