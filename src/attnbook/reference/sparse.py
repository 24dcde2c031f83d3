"""Sparse patterns in NumPy: the mask of every pattern, pair by pair, and dense attention under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.reference.dense import Array, attention


def _under(
    sees: Callable[[int, int, int, int], bool],
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    patterns: tuple[int, int] = (1, 1),
    attn_mask: ArrayLike | None,
    **rest: Any,
) -> Array:
    """Attend where ``sees(b, h, p, j)``: in sequence b, head h, the query at place p sees the key at place j.

    The last query stands at the last key. ``patterns`` counts sequences and heads that have a pattern of their own.
    """
    L, S = np.shape(query)[2], np.shape(key)[2]
    mask = np.zeros((*patterns, L, S), dtype=bool)
    for b, h, i, j in np.ndindex(mask.shape):
        mask[b, h, i, j] = sees(b, h, i + S - L, j)
    if attn_mask is not None:
        mask = mask & np.asarray(attn_mask)
    return attention(query, key, value, attn_mask=mask, **rest)


def sliding_window_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    window: int,
    dilation: int = 1,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend to distances 0, d, 2d, …, (window − 1)·d.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        window: keys on either side, the query's own place included in both.
        dilation: d.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    distances = [step * dilation for step in range(window)]
    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale}
    return _under(lambda b, h, p, j: abs(p - j) in distances, query, key, value, **rest)


def strided_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    stride: int,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend to distances below the stride, and to its multiples.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        stride: the paper's l.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale}
    return _under(lambda b, h, p, j: abs(p - j) < stride or (p - j) % stride == 0, query, key, value, **rest)


def global_token_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    global_tokens: ArrayLike,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend where the query or the key is global.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        global_tokens: (S,) or (B, S) bool.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    tokens = np.atleast_2d(global_tokens)
    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "patterns": (len(tokens), 1)}
    return _under(lambda b, h, p, j: tokens[b, j] or (p >= 0 and tokens[b, p]), query, key, value, **rest)


def longformer_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    window: int,
    global_tokens: ArrayLike,
    dilation: int = 1,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend where :func:`sliding_window_attention` or :func:`global_token_attention` does.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        window: as for :func:`sliding_window_attention`.
        global_tokens: (S,) or (B, S) bool.
        dilation: as for :func:`sliding_window_attention`.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    tokens = np.atleast_2d(global_tokens)
    distances = [step * dilation for step in range(window)]

    def sees(b: int, h: int, p: int, j: int) -> bool:
        return abs(p - j) in distances or tokens[b, j] or (p >= 0 and tokens[b, p])

    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "patterns": (len(tokens), 1)}
    return _under(sees, query, key, value, **rest)


def block_sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    layout: ArrayLike,
    block_size: int,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend where the layout allows the block of the query and that of the key.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        layout: broadcastable to (B, H, rows, columns), bool.
        block_size: side of a block; blocks are counted from the first query and the first key.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    L, S = np.shape(query)[2], np.shape(key)[2]
    blocks = np.asarray(layout)[(None,) * (4 - np.ndim(layout))]

    def sees(b: int, h: int, p: int, j: int) -> bool:
        return blocks[b, h, (p - S + L) // block_size, j // block_size]

    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "patterns": blocks.shape[:2]}
    return _under(sees, query, key, value, **rest)


def bigbird_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    random_blocks: NDArray[np.int64],
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: int = 1,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend to neighbouring blocks, to those drawn, and to and from the leading ones.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        random_blocks: (n, r) or (H, n, r), the blocks drawn for each of the n blocks of queries.
        block_size: side of a block.
        window_blocks: width of the window, in blocks.
        global_blocks: number of leading blocks that are global.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    drawn = np.asarray(random_blocks)[(None,) * (3 - np.ndim(random_blocks))]

    def sees(b: int, h: int, p: int, j: int) -> bool:
        own, other = p // block_size, j // block_size
        near = abs(own - other) <= window_blocks // 2
        return near or own < global_blocks or other < global_blocks or other in drawn[h, own]

    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "patterns": (1, len(drawn))}
    return _under(sees, query, key, value, **rest)


def document_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    ids: ArrayLike,
    is_causal: bool = False,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Attend where the ids are equal.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        ids: (L,) or (B, L) integers.
        is_causal: as for :func:`attention`.
        attn_mask: as for :func:`attention`.
        scale: as for :func:`attention`.
    Returns:
        (B, H, L, Dv) float64.
    """
    names = np.atleast_2d(ids)
    rest = {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale, "patterns": (len(names), 1)}
    return _under(lambda b, h, p, j: names[b, p] == names[b, j], query, key, value, **rest)
