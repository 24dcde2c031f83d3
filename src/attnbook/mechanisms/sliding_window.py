"""Windows: each query sees the keys near it, at every step or at every few, and perhaps far ones at a stride."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.mechanisms.pattern import ROWS, Tile, attend_in_parts, attend_in_tiles
from attnbook.shapes import AttentionShape, check_count


def _places(origin: int, spacing: int, begin: int, end: int) -> range:
    """Return where steps begin … end − 1 of a residue lie."""
    return range(origin + begin * spacing, origin + (end - 1) * spacing + 1, spacing)


def window_tiles(
    shape: AttentionShape, *, window: int, dilation: int, is_causal: bool, device: torch.device
) -> Iterator[Tile]:
    """Cover a window around each query; each dilation's residue is a sequence of its own with a plain window.

    Args:
        shape: of the call.
        window: keys on either side, the query's own place included in both.
        dilation: distance between them.
        is_causal: look back only.
        device: where to make masks.
    Yields:
        Tiles of at most ``ROWS`` queries.
    """
    first = shape.S - shape.L  # the first query's place
    bands: dict[tuple[int, int, int], Tensor] = {}
    for residue in range(min(dilation, shape.S)):
        # Step m of this residue is place residue + m · dilation; keys have steps 0 … keys − 1.
        keys = -((residue - shape.S) // dilation)
        begin = max(-((residue - first) // dilation), 0 if is_causal else 1 - window)
        for m in range(begin, keys, ROWS):
            end = min(m + ROWS, keys)
            low, high = max(0, m - window + 1), end if is_causal else min(end + window - 1, keys)
            if low >= high:
                continue
            shown = (m - low, end - m, high - low)  # tiles that differ by a shift share their mask
            if shown not in bands:
                behind = torch.arange(m, end, device=device)[:, None] - torch.arange(low, high, device=device)
                bands[shown] = (behind < window) & (behind >= (0 if is_causal else 1 - window))
            rows = _places(residue - first, dilation, m, end)
            yield Tile(rows, _places(residue, dilation, low, high), bands[shown])


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    dilation: int = 1,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each query attend to the keys near it, and compute no other pair.

    Softmax attention under :func:`attnbook.masks.sliding_window`; with a dilation d, only keys whose distance is a
    multiple of d, as far as (window − 1) · d ({cite}`beltagy2020`, fig. 2b and 2c). Differs from the paper: its
    window counts both sides together; ours counts one, the query's own place included.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        window: how many keys a causal query sees, its own included; otherwise as many on either side, 2·window − 1 in
            all. Where L ≠ S the ends are aligned.
        dilation: distance between neighbouring keys of a window; 1 leaves no gap.
        is_causal: look back only.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN, a window or a dilation below 1.
    Cost: O(L·window·D) time, O(L + S) memory beyond inputs and output; the backward pass computes the scores again.
    """
    shape = check_call(query, key, value)
    check_count("window", window)
    check_count("dilation", dilation)
    attn_mask = check_pair_mask(attn_mask, shape)
    tiles = window_tiles(shape, window=window, dilation=dilation, is_causal=is_causal, device=query.device)
    return attend_in_tiles(query, key, value, tuple(tiles), attn_mask=attn_mask, scale=scale)


def _far_tiles(shape: AttentionShape, *, stride: int, is_causal: bool, device: torch.device) -> Iterator[Tile]:
    """Cover the keys at one, two, … strides from each query."""
    first = shape.S - shape.L
    for residue in range(min(stride, shape.S)):
        keys = -((residue - shape.S) // stride)  # as in window_tiles
        begin, end = -((residue - first) // stride), keys
        if is_causal:  # step m sees steps 0 … m − 1, and the last one all but its own
            begin = max(begin, 1)
            if begin < end:
                columns = _places(residue, stride, 0, keys - 1)
                yield Tile(_places(residue - first, stride, begin, end), columns, is_causal=True)
            continue
        if keys == 1:
            end = 0  # the only key is its own query's near one
        for m in range(begin, end, ROWS):
            stop = min(m + ROWS, end)
            apart = torch.arange(m, stop, device=device)[:, None] != torch.arange(keys, device=device)
            yield Tile(_places(residue - first, stride, m, stop), _places(residue, stride, 0, keys), apart)


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    stride: int,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each query attend to the keys nearer than a stride, and to every key whole strides away.

    The sets A⁽¹⁾ and A⁽²⁾ of {cite}`child2019` ("strided attention"), as one set (its "merged" head): with the stride
    near √N each set is small, and any two places are two layers apart. Differs from the paper, whose models are
    causal: without ``is_causal`` the pattern reaches to both sides.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        stride: the paper's l. Where L ≠ S the ends are aligned.
        is_causal: look back only.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN, a stride below 1.
    Cost: O(L·(stride + S/stride)·D) time, O(L√S·D) with the best stride; O(L + S) memory beyond inputs and output.
    """
    shape = check_call(query, key, value)
    check_count("stride", stride)
    attn_mask = check_pair_mask(attn_mask, shape)
    near = window_tiles(shape, window=stride, dilation=1, is_causal=is_causal, device=query.device)
    far = _far_tiles(shape, stride=stride, is_causal=is_causal, device=query.device)
    return attend_in_parts(query, key, value, (tuple(near), tuple(far)), attn_mask=attn_mask, scale=scale)
