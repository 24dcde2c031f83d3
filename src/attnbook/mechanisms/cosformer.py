"""cosFormer: linear attention that favours near positions, by a cosine that splits into two products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, widen, working_type
from attnbook.mechanisms.linear import hide
from attnbook.mechanisms.linear_forms import attend, check_form
from attnbook.shapes import check_count, mismatch


def cosformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    horizon: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    form: str = "chunked",
    chunk_size: int = 64,
) -> Tensor:
    """Weigh values by relu(q)·relu(k) and by the cosine of their distance.

    The weight of key j for query i is relu(qᵢ)·relu(kⱼ) cos(π (i − j) / 2M), divided by the row's sum
    {cite}`qin2022`; as cos(a − b) = cos a cos b + sin a sin b it is a product of features twice as long.
    Differs from the paper: where L ≠ S the ends of queries and keys are aligned, not their beginnings; and a row whose
    weights are all zero gives 0, where the authors' code keeps the denominator above 10⁻⁶.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        horizon: M, the distance at which the cosine reaches zero; at least the larger of L and S, its default. Fix it
            where sequences grow, as in decoding: the default changes the weights with the length.
        attn_mask: of keys, broadcastable to (B, H, 1, S), bool; True = may be attended to.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        form: "chunked", "parallel" or "recurrent", as in ``linear_attention``.
        chunk_size: positions of a chunk.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes, types or sizes that do not fit; a horizon shorter than the sequence; NaN in query or key.
    Cost: O((L + S)·D·(C + Dv)) time and O((L + S)(D + Dv)) memory, with chunks of C.
    """
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    check_form(form, is_causal, chunk_size, None, False)
    longest = max(shape.L, shape.S)
    horizon = longest if horizon is None else check_count("horizon", horizon)
    if horizon < longest:
        raise mismatch("horizon", f"an integer ≥ {longest}, the longer of queries and keys", str(horizon))
    query, key, value, dtype = query.to(working_type(query)), widen(key, shape), widen(value, shape), query.dtype
    q = _turned(query, longest - shape.L, horizon)
    k = hide(_turned(key, longest - shape.S, horizon), mask)
    output, _ = attend(q, k, value, is_causal=is_causal, form=form, chunk_size=chunk_size)
    return output.to(dtype)


def _turned(x: Tensor, first: int, horizon: int) -> Tensor:
    """(B, H, n, D) → (B, H, n, 2D): relu(x) cos a and relu(x) sin a, none of them negative, for a from 0 to π/2."""
    positions = torch.arange(first, first + x.shape[2], device=x.device, dtype=x.dtype)
    angle = positions[:, None] * (math.pi / 2 / horizon)
    x = x.relu()
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)
