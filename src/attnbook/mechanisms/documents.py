"""Attention inside documents that were packed into one row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.mechanisms.pattern import Tile, attend_in_tiles
from attnbook.shapes import check_broadcastable, check_tensor


def _tiles(ids: Tensor, is_causal: bool, batch: int | None) -> Iterator[Tile]:
    """Yield a tile for each document of one row of ids (L,), in the order of the ids."""
    order = ids.argsort(stable=True)
    counts = ids[order].unique_consecutive(return_counts=True)[1]
    for places in order.split(counts.tolist()):
        first, last = int(places[0]), int(places[-1])
        index = range(first, last + 1) if last - first == len(places) - 1 else places
        yield Tile(index, index, is_causal=is_causal, batch=batch)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ids: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each position attend to its own document alone, where several share a row, and compute no other pair.

    Softmax attention under :func:`attnbook.masks.document`: what {cite}`krell2021` obtain with a
    block-diagonal mask, here without the mask. Positions within documents are for the caller to count from 0.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D): as many positions.
        value: (B, Hkv, L, Dv).
        ids: (L,) or (B, L) integers, equal where positions belong to the same document; a document need not be in one
            piece.
        is_causal: let each position see itself and earlier ones of its document.
        attn_mask: broadcastable to (B, H, L, L), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, NaN, ids that are no integers.
    Cost: O(Σ n²·D) time over the documents' lengths n, O(L) memory beyond inputs and output.
    """
    shape = check_call(query, key, value, equal_lengths=True)
    attn_mask = check_pair_mask(attn_mask, shape)
    check_tensor("ids", ids, "... L", dtypes=(torch.int64, torch.int32, torch.int16, torch.uint8))
    check_broadcastable("ids", ids, (shape.B, shape.L), "B L")
    ids = ids.to(query.device).expand(*ids.shape[:-1], shape.L).reshape(-1, shape.L)
    several = len(ids) > 1
    tiles = [tile for batch, row in enumerate(ids) for tile in _tiles(row, is_causal, batch if several else None)]
    return attend_in_tiles(query, key, value, tiles, attn_mask=attn_mask, scale=scale)
