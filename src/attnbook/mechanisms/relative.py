"""Attention with relative positions, in each published form: in the scores, in the values, or in the rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.masks import relative_positions
from attnbook.mechanisms.common import check_call, naive_scores, widen, working_type
from attnbook.normalizers import softmax
from attnbook.positions import RotaryEmbedding, alibi_bias, relative_scores, relative_values, t5_buckets
from attnbook.shapes import check_tensor, mismatch, tensor_shape


def _table(argument: str, table: Tensor, query: Tensor, *, width: int, rows: str, fits: bool = True) -> Tensor:
    """Check a table of vectors for relative positions, and bring it into the working type.

    Args:
        argument: its name.
        table: (R, width), the same for all heads, or (H, R, width).
        query: (B, H, L, D) of the call.
        width: of its rows.
        rows: what R should be, for the message.
        fits: whether R is that.
    """
    heads = query.shape[1]
    check_tensor(argument, table, "... R D")
    if table.dim() > 3 or table.shape[-1] != width or table.shape[:-2] not in ((), (heads,)) or not fits:
        raise mismatch(argument, f"(R, {width}) or ({heads}, R, {width}) with {rows}", tensor_shape(table))
    return table.to(working_type(query))


def _rows(table: Tensor) -> int:
    return table.shape[-2] if isinstance(table, Tensor) and table.dim() > 1 else 0


def _mix(scores: Tensor, mask: Tensor | None, value: Tensor, query: Tensor) -> Tensor:
    return (softmax(scores, mask=mask) @ value).to(query.dtype)


def skew(by_distance: Tensor, S: int) -> Tensor:
    """Turn scores by distance into scores by key: shift row i of L rows left by L − 1 − i, without looking up.

    out[i, j] = in[i, j − i + L − 1]. A column of padding and two reshapes do it ({cite}`huang2019`, §3.4.1;
    {cite}`dai2019`, appendix B).

    Args:
        by_distance: (…, L, R), R = L + S − 1: from S − 1 positions behind the last query to L − 1 ahead of the first;
            or R = S where keys ahead are masked anyway, and what is returned for them means nothing.
        S: number of keys; ends are aligned.
    Returns:
        (…, L, S).
    """
    L, R = by_distance.shape[-2:]
    padded = torch.nn.functional.pad(by_distance, (1, 0)).flatten(-2)  # (…, L·(R + 1))
    return padded[..., L:].unflatten(-1, (L, R))[..., :S]


def shaw_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_table: Tensor,
    value_table: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Add a learned vector for each clipped distance to the keys, and another to the values.

    Scores qᵢ·(kⱼ + aᵢⱼ)·scale, output Σⱼ pᵢⱼ (vⱼ + bᵢⱼ), a and b rows of the tables by j − i clipped to [−k, k]
    ({cite}`shaw2018`, eqs. 3 and 4). Differs from the paper: each head may have a table of its own.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        key_table: (2k + 1, D) or (H, 2k + 1, D): rows from k positions behind the query to k ahead of it.
        value_table: (2k + 1, Dv) or (H, 2k + 1, Dv), likewise, with a k of its own; none by default.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN, a table with an even number of rows.
    Cost: O(LSD) time, O(LS + Lk) memory; the (L, S, D) tensor of the definition is never built.
    """
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    S, D, Dv = value.shape[2], query.shape[3], value.shape[3]
    odd = "an odd number R = 2k + 1 of rows"
    table = _table("key_table", key_table, query, width=D, rows=odd, fits=_rows(key_table) % 2 == 1)
    wide, factor = query.to(scores.dtype), D**-0.5 if scale is None else scale
    weights = softmax(scores + relative_scores(wide, table, S, scale=factor), mask=mask)
    output = weights @ value
    if value_table is not None:
        table = _table("value_table", value_table, query, width=Dv, rows=odd, fits=_rows(value_table) % 2 == 1)
        output = output + relative_values(weights, table)
    return output.to(query.dtype)


def transformer_xl_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_key: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Score contents and distances apart, each with a query of its own that does not depend on the word.

    Scores ((qᵢ + u)·kⱼ + (qᵢ + v)·r₍ᵢ₋ⱼ₎)·scale ({cite}`dai2019`, §3.3). The second term is computed for every distance
    and shifted into place (:func:`skew`). Keys before the segment, the paper's memory, are simply more keys: S > L.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        position_key: (R, D) or (H, R, D), the projected encodings r of the distances S − 1, …, 0 (R = S, enough if
            causal) or S − 1, …, 1 − L (R = L + S − 1), in this order.
        content_bias: (H, D), u.
        position_bias: (H, D), v.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN, a wrong number of distances.
    Cost: O(L(L + S)D) time, O(L(L + S)) memory; looking each pair's vector up would take O(LSD) memory.
    """
    shape = check_call(query, key, value)
    for name, bias in (("content_bias", content_bias), ("position_bias", position_bias)):
        if check_tensor(name, bias, "H D").shape != (shape.H, shape.D):
            raise mismatch(name, f"(H, D) = {(shape.H, shape.D)}", tensor_shape(bias))
    every = shape.L + shape.S - 1
    wanted = f"R = L + S − 1 = {every} rows" + (f", or R = S = {shape.S}" if is_causal else "")
    fits = _rows(position_key) in ((every, shape.S) if is_causal else (every,))
    table = _table("position_key", position_key, query, width=shape.D, rows=wanted, fits=fits)
    work = table.dtype
    wide = query.to(work)
    scores, mask, value = naive_scores(
        wide + content_bias.to(work)[:, None],
        key.to(work),
        value.to(work),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
    factor = shape.D**-0.5 if scale is None else scale
    by_distance = ((wide + position_bias.to(work)[:, None]) * factor) @ table.transpose(-2, -1)  # (B, H, L, R)
    return _mix(scores + skew(by_distance, shape.S), mask, value, query)


def music_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    table: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Add to each score the query's product with a vector of the distance; causal.

    Scores qᵢ·(kⱼ + e₍ᵢ₋ⱼ₎)·scale, as in {cite}`shaw2018` without its values' part; the Music Transformer computes the
    second term by skewing Q Eᵀ ({cite}`huang2019`, §3.4.1). Differs from the paper: S may exceed L, ends aligned.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        table: (R, D) or (H, R, D): e for the distances R − 1, …, 0, in this order; longer ones are clipped to R − 1.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    Cost: O(LSD) time, O(LS + SD) memory, where {cite}`shaw2018` as written takes O(LSD) memory.
    """
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=True, scale=scale)
    S, D = value.shape[2], query.shape[3]
    table = _table("table", table, query, width=D, rows="R ≥ 1 rows")
    R = table.shape[-2]
    nearest = (torch.arange(S, device=table.device) + (R - S)).clamp(min=0)  # distances S − 1, …, 0
    factor = D**-0.5 if scale is None else scale
    by_distance = (query.to(table.dtype) * factor) @ table[..., nearest, :].transpose(-2, -1)  # (B, H, L, S)
    return _mix(scores + skew(by_distance, S), mask, value, query)


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_key: Tensor,
    position_query: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Score content by content, content by position and position by content (DeBERTa).

    Scores (qᵢ·kⱼ + qᵢ·r_δ(i,j) + kⱼ·s_δ(j,i))·scale with δ(i, j) = i − j + k clipped to [0, 2k − 1]
    ({cite}`he2021`, eqs. 3 and 4). The authors' code takes row δ(i, j) for the last term too; reverse the rows of
    ``position_query`` (s'ₘ = s₂ₖ₋ₘ) to use weights trained with it.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        position_key: (2k, D) or (H, 2k, D): r, the projected encodings of the distances −k, …, k − 1 of a key behind
            the query.
        position_query: (2k, D) or (H, 2k, D): s, likewise for the distance of the query behind the key.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√(3D) by default, as three terms are added.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN, a table with an odd number of rows.
    Cost: O(LSD + (L + S)kD) time, O(LS + (L + S)k) memory.
    """
    shape = check_call(query, key, value)
    scale = (3 * shape.D) ** -0.5 if scale is None else scale
    tables = []
    for name, table in (("position_key", position_key), ("position_query", position_query)):
        even = _rows(table) > 0 and _rows(table) % 2 == 0
        tables.append(_table(name, table, query, width=shape.D, rows="an even number R = 2k of rows", fits=even))
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    behind = relative_positions(shape.L, shape.S, device=query.device)  # i − j

    def look_up(x: Tensor, table: Tensor, distance: Tensor) -> Tensor:
        reach = table.shape[-2] // 2
        index = (distance + reach).clamp(0, 2 * reach - 1).expand(*x.shape[:2], *distance.shape)
        return ((x * scale) @ table.transpose(-2, -1)).gather(-1, index)  # (B, H, rows of x, 2k) → (B, H, *distance)

    to_position = look_up(query.to(scores.dtype), tables[0], behind)  # (B, H, L, S)
    to_content = look_up(widen(key, shape), tables[1], -behind.T).transpose(-2, -1)  # (B, H, S, L) → (B, H, L, S)
    return _mix(scores + to_position + to_content, mask, value, query)


def t5_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    table: Tensor,
    max_distance: int = 128,
    bidirectional: bool | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Add to each score a number that depends on the head and the bucket of the distance (T5).

    {cite}`raffel2020`, §2.1; the buckets are those of :func:`attnbook.positions.t5_buckets`.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        table: (R, H), one number for each of R buckets and each head; R even, at least 4.
        max_distance: distances from it on share the last bucket.
        bidirectional: give keys ahead of the query buckets of their own; by default where not causal.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the products; 1 by default: T5 leaves 1/√D to the initialisation of its weights.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN, an odd number of buckets.
    Cost: O(LSD) time, O(LS) memory.
    """
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    heads, L, S = scores.shape[1:]
    if check_tensor("table", table, "R H").shape[1] != heads:
        raise mismatch("table", f"(R, H) with H = {heads}", tensor_shape(table))
    buckets = t5_buckets(
        relative_positions(L, S, device=table.device),
        num_buckets=table.shape[0],
        max_distance=max_distance,
        bidirectional=not is_causal if bidirectional is None else bidirectional,
    )
    bias = table.to(scores.dtype)[buckets].movedim(-1, 0)  # (L, S, H) → (H, L, S)
    return _mix(scores + bias, mask, value, query)


def alibi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Penalise each score by the distance, with a fixed slope for each head (ALiBi).

    {cite}`press2022`, §3. Differs from the paper, which is causal: without ``is_causal``, keys ahead of the query pay
    by distance too.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the products, not of the penalty; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    Cost: O(LSD) time, O(LS) memory.
    """
    scores, mask, value = naive_scores(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    bias = alibi_bias(*scores.shape[1:], device=scores.device, dtype=scores.dtype)  # (H, L, S)
    return _mix(scores + bias, mask, value, query)


def rotary_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    base: float = 10000.0,
    pairing: str = "halves",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Turn queries and keys by their positions, so that scores depend on the difference (RoPE).

    {cite}`su2024`, eq. 34, with :class:`attnbook.positions.RotaryEmbedding`. Keys stand at 0, …, S − 1; queries at the
    last L of these positions.

    Args:
        query: (B, H, L, D) float, D even.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        base: as for :class:`attnbook.positions.RotaryEmbedding`.
        pairing: "halves" or "interleaved": which components turn together.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, NaN, D odd, an unknown pairing.
    Cost: O(LSD) time, O(LS) memory.
    """
    shape = check_call(query, key, value)
    rotary, work = RotaryEmbedding(shape.D, base=base, pairing=pairing), working_type(query)
    places = torch.arange(shape.S, device=query.device)
    turned = rotary(query.to(work), torch.arange(shape.S - shape.L, shape.S, device=query.device))
    scores, mask, value = naive_scores(
        turned,
        rotary(key.to(work), places),
        value.to(work),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
    return _mix(scores, mask, value, query)
