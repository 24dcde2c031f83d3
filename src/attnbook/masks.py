"""Masks: boolean tensors that say who may attend to whom.

One convention everywhere: **True = may attend**. A mask broadcasts to (B, H, L, S), and masks combine with ``&`` and
``|``. Where queries and keys differ in number, the last query stands at the last key (``align="end"``): that is what
decoding with a cache needs. :func:`to_bias` turns a mask into the additive form that other libraries expect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.shapes import check_choice, check_count, check_tensor, mismatch

ALIGN = ("end", "start")


def relative_positions(
    L: int, S: int | None = None, *, align: str = "end", device: torch.device | None = None
) -> Tensor:
    """Return how far each key stands behind each query: (position of the query) − (position of the key).

    Args:
        L: number of queries.
        S: number of keys; L by default.
        align: "end" puts the last query at the last key, "start" the first at the first.
        device: where to make it.
    Returns:
        (L, S) int64; zero where query and key stand at the same position, negative where the key lies ahead.
    Raises:
        ValueError: L or S below 1, an unknown alignment.
    """
    check_count("L", L)
    S = L if S is None else check_count("S", S)
    offset = S - L if check_choice("align", align, ALIGN) == "end" else 0
    return torch.arange(L, device=device)[:, None] + offset - torch.arange(S, device=device)


def causal(L: int, S: int | None = None, *, align: str = "end", device: torch.device | None = None) -> Tensor:
    """Let each query attend to its own position and to those before it.

    Args:
        L: number of queries.
        S: number of keys; L by default.
        align: "end" (the last query sees every key) or "start" (the first query sees one key).
        device: where to make it.
    Returns:
        (L, S) bool. With ``align="end"`` and L > S the first L − S rows are empty.
    Raises:
        ValueError: L or S below 1, an unknown alignment.
    """
    return relative_positions(L, S, align=align, device=device) >= 0


def padding(lengths: Tensor, S: int | None = None) -> Tensor:
    """Let every query attend to the real keys of its sequence, not to the padding behind them.

    Args:
        lengths: (B,) integers between 0 and S: the number of real keys of each sequence.
        S: padded length; the largest of ``lengths`` by default.
    Returns:
        (B, 1, 1, S) bool.
    Raises:
        ValueError: lengths that are no integers, negative, or larger than S.
    """
    check_tensor("lengths", lengths, "B", dtypes=(torch.int64, torch.int32, torch.int16, torch.uint8))
    S = max(int(lengths.max()), 1) if S is None else check_count("S", S)
    if int(lengths.min()) < 0 or int(lengths.max()) > S:
        raise mismatch("lengths", f"integers in [0, S = {S}]", str(lengths.tolist()))
    return (torch.arange(S, device=lengths.device) < lengths[:, None])[:, None, None, :]


def sliding_window(
    L: int, S: int | None = None, *, window: int, causal: bool = True, device: torch.device | None = None
) -> Tensor:
    """Let each query attend to the keys near it.

    Args:
        L: number of queries.
        S: number of keys; L by default. Ends are aligned.
        window: how many keys a causal query sees, its own included; without ``causal``, the same number on either side
            (its own counted in both), 2·window − 1 in all.
        causal: look back only.
        device: where to make it.
    Returns:
        (L, S) bool.
    Raises:
        ValueError: L, S or window below 1.
    """
    check_count("window", window)
    behind = relative_positions(L, S, device=device)
    return (behind < window) & (behind >= (0 if causal else 1 - window))


def prefix(L: int, S: int | None = None, *, prefix_length: int, device: torch.device | None = None) -> Tensor:
    """Let every query attend to a prefix, and causally to what follows it.

    This is the prefix-LM mask of {cite}`raffel2020`, fig. 4.

    Args:
        L: number of queries.
        S: number of keys; L by default. Ends are aligned.
        prefix_length: number of leading keys that everyone sees; 0 gives the causal mask.
        device: where to make it.
    Returns:
        (L, S) bool.
    Raises:
        ValueError: L or S below 1, prefix_length negative.
    """
    check_count("prefix_length", prefix_length, least=0)
    mask = causal(L, S, device=device)
    return mask | (torch.arange(mask.shape[1], device=device) < prefix_length)


def document(ids: Tensor) -> Tensor:
    """Keep sequences that share a row apart: attend only within the same document.

    Args:
        ids: (B, L) integers, equal where positions belong to the same document.
    Returns:
        (B, 1, L, L) bool. Not causal: combine with :func:`causal` by ``&`` for a decoder.
    Raises:
        ValueError: ids that are no integers or have another rank.
    """
    check_tensor("ids", ids, "B L", dtypes=(torch.int64, torch.int32, torch.int16, torch.uint8))
    return (ids[:, :, None] == ids[:, None, :])[:, None]


def block(layout: Tensor, *, block_size: int, L: int | None = None, S: int | None = None) -> Tensor:
    """Enlarge a coarse pattern: every entry of the layout becomes a square of equal entries.

    Args:
        layout: (…, rows, columns) bool, True where a block of queries may attend to a block of keys.
        block_size: side of a block.
        L: number of queries, at most rows · block_size (the last block may be cut); all of them by default.
        S: number of keys, likewise.
    Returns:
        (…, L, S) bool.
    Raises:
        ValueError: a layout that is not boolean, block_size below 1, L or S out of range.
    """
    check_tensor("layout", layout, "... rows columns", dtypes=(torch.bool,))
    check_count("block_size", block_size)
    full = layout.repeat_interleave(block_size, -2).repeat_interleave(block_size, -1)
    for name, size, most in (("L", L, full.shape[-2]), ("S", S, full.shape[-1])):
        if size is not None and not most - block_size < check_count(name, size) <= most:
            raise mismatch(name, f"an integer in ({most - block_size}, {most}], to fit the layout", size)
    return full[..., :L, :S]


def to_bias(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn a mask into the additive form: 0 where attention is allowed, −∞ where it is not.

    A row that is −∞ throughout has no softmax; :func:`attnbook.attention` gives it zero weight, most others give NaN.

    Args:
        mask: any shape, bool.
        dtype: floating type of the result.
    Returns:
        Same shape, ``dtype``.
    Raises:
        ValueError: a mask that is not boolean, a dtype that is not floating.
    """
    check_tensor("mask", mask, "...", dtypes=(torch.bool,))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise mismatch("dtype", "a floating type of torch", str(dtype))
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
