"""Global tokens: a few places that see everything and that everyone sees, alone or with a window (Longformer)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.mechanisms.pattern import ROWS, Tile, attend_in_tiles
from attnbook.mechanisms.sliding_window import window_tiles
from attnbook.shapes import AttentionShape, check_broadcastable, check_count, check_tensor


def _with_global_tokens(
    tiles: Sequence[Tile], global_tokens: Tensor, shape: AttentionShape, is_causal: bool, batch: int | None
) -> Iterator[Tile]:
    """Let every query see the global tokens too, and those see all; ``global_tokens`` is (S,) here."""
    device, first = global_tokens.device, shape.S - shape.L
    tokens = global_tokens.nonzero()[:, 0]
    apart = torch.ones(shape.L, dtype=torch.bool, device=device)  # queries that are not global
    apart[(tokens - first)[tokens >= first]] = False
    waiting = apart.clone()  # those of them that are in no tile yet

    def seen(rows: Tensor, keys: Tensor) -> Tensor:
        """(Lb, Sb): of keys that are all in the pattern, those that causality leaves."""
        places = rows[:, None] + first
        return keys <= places if is_causal else torch.ones_like(keys <= places)

    for tile in tiles:
        rows = torch.arange(tile.rows.start, tile.rows.stop, tile.rows.step, device=device)
        columns = torch.arange(tile.columns.start, tile.columns.stop, tile.columns.step, device=device)
        waiting[rows] = False
        mask, rows = tile.mask[apart[rows]], rows[apart[rows]]
        more = tokens[~torch.isin(tokens, columns)]
        if len(rows):
            mask = mask | (seen(rows, columns) & global_tokens[columns])
            yield Tile(rows, torch.cat([columns, more]), torch.cat([mask, seen(rows, more)], 1), batch=batch)
    for rows in waiting.nonzero()[:, 0].split(ROWS):
        mask = seen(rows, tokens)
        full = mask.any(-1)
        if full.any():
            yield Tile(rows[full], tokens, mask[full], batch=batch)
    for rows in (~apart).nonzero()[:, 0].split(ROWS):
        if len(rows):
            keys = torch.arange(int(rows[-1]) + first + 1 if is_causal else shape.S, device=device)
            yield Tile(rows, range(len(keys)), seen(rows, keys), batch=batch)


def _tiles(
    global_tokens: Tensor, shape: AttentionShape, *, window: int, dilation: int, is_causal: bool, device: torch.device
) -> list[Tile]:
    """Check the global tokens and cover the pattern; a window of 0 is none."""
    check_tensor("global_tokens", global_tokens, "... S", dtypes=(torch.bool,))
    check_broadcastable("global_tokens", global_tokens, (shape.B, shape.S), "B S")
    global_tokens = global_tokens.to(device).expand(*global_tokens.shape[:-1], shape.S).reshape(-1, shape.S)
    near: Sequence[Tile] = ()
    if window:
        rules = {"window": window, "dilation": dilation, "is_causal": is_causal}
        near = tuple(window_tiles(shape, **rules, device=device))
    several = len(global_tokens) > 1
    return [
        tile
        for batch, tokens in enumerate(global_tokens)
        for tile in _with_global_tokens(near, tokens, shape, is_causal, batch if several else None)
    ]


def global_token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    global_tokens: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let every query attend to the global tokens, and those to everything; no other pair is computed.

    The global part of {cite}`beltagy2020` on its own. A query that no global token stands before gets zeros
    where ``is_causal``.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        global_tokens: (S,) or (B, S) bool, True where a place is global, as a key and as a query; where L ≠ S the ends
            are aligned.
        is_causal: let each query see its own position and earlier ones.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN.
    Cost: O((L + S)·g·D) time for g global tokens, O(L + S) memory beyond inputs and output.
    """
    shape = check_call(query, key, value)
    attn_mask = check_pair_mask(attn_mask, shape)
    rules = {"window": 0, "dilation": 1, "is_causal": is_causal, "device": query.device}
    tiles = _tiles(global_tokens, shape, **rules)
    return attend_in_tiles(query, key, value, tiles, attn_mask=attn_mask, scale=scale)


def longformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    global_tokens: Tensor,
    dilation: int = 1,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each query attend to the keys near it and to the global tokens, and those to everything.

    {cite}`beltagy2020`, fig. 2d. Differs from the paper: there global tokens are queries through a projection of
    their own, and everyone's keys and values for them too (a matter of the layer: call
    :func:`global_token_attention` with those); its window counts both sides together; its dilation may differ from head
    to head, and its causal models have no global tokens.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        window: as for :func:`sliding_window_attention`: keys on one side, the query's own place included.
        global_tokens: (S,) or (B, S) bool, True where a place is global, as a key and as a query.
        dilation: distance between neighbouring keys of a window.
        is_causal: let each query see its own position and earlier ones, where L ≠ S ends aligned; for global tokens
            too.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN, a window or a dilation below 1.
    Cost: O((L·window + (L + S)·g)·D) time for g global tokens, O(L + S) memory beyond inputs and output.
    """
    shape = check_call(query, key, value)
    check_count("window", window)
    check_count("dilation", dilation)
    attn_mask = check_pair_mask(attn_mask, shape)
    rules = {"window": window, "dilation": dilation, "is_causal": is_causal, "device": query.device}
    tiles = _tiles(global_tokens, shape, **rules)
    return attend_in_tiles(query, key, value, tiles, attn_mask=attn_mask, scale=scale)
