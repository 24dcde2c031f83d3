"""Block-sparse attention: whole blocks of pairs, chosen by a layout or by BigBird's rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from attnbook.mechanisms.common import check_call, check_pair_mask
from attnbook.mechanisms.pattern import Tile, attend_in_tiles
from attnbook.shapes import AttentionShape, check_broadcastable, check_count, check_tensor, describe, mismatch


class _Blocks:
    """The geometry of one call: blocks of queries and of keys, the last of either perhaps cut."""

    def __init__(self, shape: AttentionShape, size: int, is_causal: bool, device: torch.device):
        self.shape, self.size, self.is_causal, self.device = shape, size, is_causal, device
        self.rows, self.columns = -(-shape.L // size), -(-shape.S // size)

    def tile(self, row: int, blocks: Sequence[int], batch: int | None, head: int | None) -> Iterator[Tile]:
        """Yield the tile of one block of queries and some blocks of keys, in ascending order; nothing where empty."""
        ahead = self.shape.S - self.shape.L  # query i stands at key i + ahead
        begin, end = row * self.size, min((row + 1) * self.size, self.shape.L)
        if self.is_causal:
            blocks = [block for block in blocks if block * self.size < end + ahead]
            begin = max(begin, blocks[0] * self.size - ahead) if blocks else end  # earlier queries see none of them
        if not blocks or begin >= end:
            return
        last = min((blocks[-1] + 1) * self.size, self.shape.S)
        if len(blocks) == blocks[-1] - blocks[0] + 1:
            columns: range | Tensor = range(blocks[0] * self.size, last)
        else:
            inside = torch.arange(self.size, device=self.device)
            columns = (torch.tensor(blocks, device=self.device)[:, None] * self.size + inside).flatten()
            columns = columns[: len(columns) - (blocks[-1] + 1) * self.size + last]
        mask = None
        if self.is_causal and last > begin + ahead + 1:  # the tile crosses the diagonal
            places = torch.arange(begin + ahead, end + ahead, device=self.device)
            keys = torch.arange(columns.start, last, device=self.device) if isinstance(columns, range) else columns
            mask = keys <= places[:, None]
        yield Tile(range(begin, end), columns, mask, batch=batch, head=head)


def _axis(size: int) -> Sequence[int | None]:
    """Return the indices of an axis of patterns, or None alone where one pattern serves all."""
    return (None,) if size == 1 else range(size)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Tensor,
    block_size: int,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each block of queries attend to the blocks of keys that a layout allows, and compute no other block.

    Softmax attention under :func:`attnbook.masks.block` (the kernels of {cite}`child2019` have this form). Where
    the block size does not divide a length, the last block is cut.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        layout: broadcastable to (B, H, ⌈L / block_size⌉, ⌈S / block_size⌉), bool, True where a block of queries may
            attend to a block of keys; its last two axes are never broadcast. One layout for all heads is fastest.
        block_size: side of a block.
        is_causal: let each query see its own position and earlier ones, ends aligned, inside blocks too.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, NaN, a layout that does not fit lengths and block size.
    Cost: O(allowed blocks · block_size²·D) time, O(L + S) memory beyond inputs and output.
    """
    shape = check_call(query, key, value)
    blocks = _Blocks(shape, check_count("block_size", block_size), is_causal, query.device)
    check_tensor("layout", layout, "... rows columns", dtypes=(torch.bool,))
    if layout.shape[-2:] != (blocks.rows, blocks.columns):
        lengths = f"L = {shape.L}, S = {shape.S} and block_size = {block_size}"
        raise mismatch("layout", f"(…, {blocks.rows}, {blocks.columns}), to fit {lengths}", layout)
    target = (shape.B, shape.H, blocks.rows, blocks.columns)
    layout = check_broadcastable("layout", layout, target, "B H rows columns")
    attn_mask = check_pair_mask(attn_mask, shape)
    allowed = layout.tolist()
    tiles = [
        tile
        for batch in _axis(len(allowed))
        for head in _axis(len(allowed[0]))
        for row, chosen in enumerate(allowed[batch or 0][head or 0])
        for tile in blocks.tile(row, [column for column, yes in enumerate(chosen) if yes], batch, head)
    ]
    return attend_in_tiles(query, key, value, tiles, attn_mask=attn_mask, scale=scale)


def draw_random_blocks(
    blocks: int,
    count: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 1,
    is_causal: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Draw the blocks of keys that each block of queries sees by chance: distinct, and none that it sees anyway.

    Args:
        blocks: number of blocks of the sequence.
        count: how many to draw for each; where fewer are left, the block's own index fills up.
        window_blocks: as for :func:`bigbird_attention`.
        global_blocks: as for :func:`bigbird_attention`.
        is_causal: draw earlier blocks only.
        generator: of random numbers.
    Returns:
        (blocks, count) int64.
    Raises:
        ValueError: blocks below 1, a negative count.
    """
    check_count("blocks", blocks)
    drawn = torch.arange(blocks)[:, None].repeat(1, check_count("count", count, least=0))
    half = window_blocks // 2
    for row in range(global_blocks, blocks):
        before = range(global_blocks, row - half)
        after = range(0) if is_causal else range(max(row + half + 1, global_blocks), blocks)
        few = torch.randperm(len(before) + len(after), generator=generator)[:count]
        far = (after.start if after else 0) - len(before)
        drawn[row, : len(few)] = torch.where(few < len(before), few + global_blocks, few + far)
    return drawn


def bigbird_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: int = 1,
    num_random_blocks: int = 3,
    random_blocks: Tensor | None = None,
    generator: Generator | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each block of queries attend to its neighbours, to a few blocks drawn at random, and to the global ones.

    {cite}`zaheer2020`, the "internal" construction (ITC): the first blocks of the sequence are
    global, that is, they see everything and everyone sees them. Differs from the authors' code: there the last block is
    global as well, and each head draws for itself (pass ``random_blocks`` with an axis of heads for that); the paper
    has no causal form.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D): as many positions.
        value: (B, Hkv, L, Dv).
        block_size: side of a block; where it does not divide L, the last block is cut.
        window_blocks: blocks of the window, the query's own in the middle; odd.
        global_blocks: how many leading blocks are global; may be 0.
        num_random_blocks: how many blocks each block of queries sees by chance; one draw for all sequences and heads.
        random_blocks: (n, r) or (H, n, r) int64, n = ⌈L / block_size⌉: use these instead of drawing
            (:func:`draw_random_blocks` draws).
        generator: of random numbers.
        is_causal: let each query see its own position and earlier ones; random blocks are drawn among earlier ones.
        attn_mask: broadcastable to (B, H, L, L), bool; True = may attend.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, NaN, an even window, indices of blocks that do not exist.
    Cost: O(L·(window_blocks + global_blocks + num_random_blocks)·block_size·D) time, O(L) memory beyond inputs and
    output.
    """
    shape = check_call(query, key, value, equal_lengths=True)
    blocks = _Blocks(shape, check_count("block_size", block_size), is_causal, query.device)
    if not check_count("window_blocks", window_blocks) % 2:
        raise mismatch("window_blocks", "an odd integer: as many on either side of the middle", window_blocks)
    check_count("global_blocks", global_blocks, least=0)
    check_count("num_random_blocks", num_random_blocks, least=0)
    attn_mask = check_pair_mask(attn_mask, shape)
    n = blocks.rows
    if random_blocks is None:
        rules = {"window_blocks": window_blocks, "global_blocks": global_blocks, "is_causal": is_causal}
        random_blocks = draw_random_blocks(n, num_random_blocks, generator=generator, **rules)
    chosen = _check_random_blocks(random_blocks, shape, n).tolist()
    half = window_blocks // 2
    tiles = []
    for head in _axis(len(chosen)):
        for row, by_chance in enumerate(chosen[head or 0]):
            window = range(max(0, row - half), min(row + half + 1, n))
            seen = range(n) if row < global_blocks else {*range(min(global_blocks, n)), *window, *by_chance}
            tiles += blocks.tile(row, sorted(seen), None, head)
    return attend_in_tiles(query, key, value, tiles, attn_mask=attn_mask, scale=scale)


def _check_random_blocks(random_blocks: Tensor, shape: AttentionShape, n: int) -> Tensor:
    """Return them as (1 or H, n, r), or complain."""
    expected = f"int64 indices of blocks in [0, {n}), (n, r) or (H, n, r) with n = {n} and H = {shape.H}"
    if not isinstance(random_blocks, Tensor) or random_blocks.dtype != torch.int64:
        raise mismatch("random_blocks", expected, describe(random_blocks))
    stacked = random_blocks[None] if random_blocks.dim() == 2 else random_blocks
    if stacked.dim() != 3 or stacked.shape[0] not in (1, shape.H) or stacked.shape[1] != n:
        raise mismatch("random_blocks", expected, random_blocks)
    if stacked.numel() and not 0 <= int(stacked.min()) <= int(stacked.max()) < n:
        raise mismatch("random_blocks", expected, f"values from {int(stacked.min())} to {int(stacked.max())}")
    return stacked
