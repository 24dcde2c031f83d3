"""A³: find the keys that matter from a few products of components, then attend to those alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, never_causal, widen, working_type
from attnbook.mechanisms.gather import take
from attnbook.normalizers import softmax
from attnbook.shapes import (
    check_count,
    check_mask,
    check_no_nan,
    check_probability,
    check_tensor,
    mismatch,
)


class SortedKeys(NamedTuple):
    """Keys prepared for the search: each component sorted by itself. Made by :func:`sort_keys`.

    Attributes:
        values: (B, Hkv, D, S), ascending; hidden keys stand last, as +∞.
        rows: (B, Hkv, D, S) int64, which key each value belongs to.
        visible: (B, Hkv, S) bool, which keys are not hidden.
    """

    values: Tensor
    rows: Tensor
    visible: Tensor


def sort_keys(key: Tensor, *, attn_mask: Tensor | None = None) -> SortedKeys:
    """Sort every component of the keys: what A³ prepares once, before queries come.

    Args:
        key: (B, Hkv, S, D) float.
        attn_mask: broadcastable to (B, Hkv, 1, S), bool; True = may be attended to.
    Returns:
        The sorted keys, in float32 or float64, without gradient.
    Raises:
        ValueError: another shape or type, NaN, a mask that differs from query to query.
    Cost: O(S·D·log S) time, O(S·D) memory.
    """
    check_no_nan("key", check_tensor("key", key, "B Hkv S D"))
    batch, heads, length, _ = key.shape
    columns = key.detach().to(working_type(key)).transpose(-1, -2)  # (B, Hkv, D, S)
    visible = torch.ones(batch, heads, length, dtype=torch.bool, device=key.device)
    if attn_mask is not None:
        mask = check_mask("attn_mask", attn_mask, (batch, heads, 1, length), "B Hkv 1 S")
        visible &= mask[:, :, 0]
        columns = columns.masked_fill(~visible[:, :, None], math.inf)
    ordered = columns.sort(stable=True)
    return SortedKeys(ordered.values, ordered.indices, visible)


def _walk(q: Tensor, ordered: SortedKeys, iterations: int, greedy: Tensor, *, largest: bool) -> Tensor:
    """Add the largest (or smallest) products q_d · k_sd to the greedy scores, one for each query and iteration.

    Each component keeps a pointer into its sorted keys, and the best of the D products at the pointers is taken. q is
    (B, Hkv, R, D), greedy (B, Hkv, R, S), changed in place. Returns how many products were made: (B, Hkv, R).
    """
    values, rows = ordered.values.flatten(2), ordered.rows.flatten(2)  # (B, Hkv, D·S)
    length, head_dim = ordered.values.shape[3], q.shape[3]
    column_start = torch.arange(head_dim, device=q.device) * length
    count = ordered.visible.sum(-1)[..., None, None]
    upwards = (q < 0) == largest  # the largest products of a negative component are those with the smallest keys
    step = torch.where(upwards, 1, -1)
    pointer = torch.where(upwards, 0, count - 1).clamp_(min=0)
    product = q * take(values, pointer + column_start)
    idle = (count == 0) | (q == 0)
    product = product.masked_fill_(idle, 0.0)  # zero: nothing (more) to gain in this column
    made = (~idle).sum(-1)
    for _ in range(iterations):
        best, column = product.max(-1, keepdim=True) if largest else product.min(-1, keepdim=True)
        found = best > 0 if largest else best < 0
        if not found.any():
            break
        at = pointer.gather(-1, column)
        row = take(rows, at + column * length)
        greedy.scatter_add_(-1, row, best.where(found, 0.0))
        at = at + step.gather(-1, column)
        more = found & (at >= 0) & (at < count)
        at.clamp_(0, length - 1)
        pointer.scatter_(-1, column, at)
        following = q.gather(-1, column) * take(values, at + column * length)
        product.scatter_(-1, column, following.where(more, 0.0))
        made += more[..., 0]
    return made


def _candidates(q: Tensor, ordered: SortedKeys, iterations: int) -> tuple[Tensor, Tensor]:
    """Return which keys the search proposes, (B, Hkv, R, S), and how many products it made, (B, Hkv, R)."""
    length = ordered.values.shape[3]
    greedy = q.new_zeros(*q.shape[:3], length)
    made = sum(_walk(q, ordered, iterations, greedy, largest=largest) for largest in (True, False))
    chosen = greedy > 0
    # A query left with nothing takes the key of the highest greedy score.
    visible = ordered.visible[:, :, None]
    best = greedy.masked_fill(~visible, -math.inf).argmax(-1, keepdim=True)
    fallback = torch.zeros_like(chosen).scatter_(-1, best, True) & visible
    return torch.where(chosen.any(-1, keepdim=True), chosen, fallback), made


class _Call:
    """What the mechanism and its bookkeeping share: checked arguments, and the blocks of queries.

    The query heads that share a key–value head are stacked: R = G·Lb rows of a block.
    """

    def __init__(self, query, key, value, iterations, threshold, prepared, attn_mask, scale, block_size):
        shape = check_call(query, key, value)
        mask = check_key_mask(attn_mask, shape)
        check_count("iterations", iterations)
        check_count("block_size", block_size)
        self.log_threshold = math.log(threshold) if check_probability("threshold", threshold) else -math.inf
        self.iterations, self.size, self.shape = iterations, block_size, shape
        self.scale = shape.D**-0.5 if scale is None else float(scale)
        work = working_type(query)
        self.q, self.k, self.v = query.to(work), key.to(work), value.to(work)
        if mask is not None and mask.shape[1] not in (1, shape.Hkv):  # query heads of a group see different keys
            self.k, self.v = widen(key, shape), widen(value, shape)
        self.heads = self.k.shape[1]
        self.ordered = sort_keys(self.k, attn_mask=mask) if prepared is None else self._fitting(prepared, mask)

    def _fitting(self, prepared: SortedKeys, mask: Tensor | None) -> SortedKeys:
        shape = self.shape
        if mask is not None:
            raise mismatch("attn_mask", "none: sort_keys takes it where keys are prepared", mask)
        if prepared.values.shape != (shape.B, shape.Hkv, shape.D, shape.S):
            expected = f"sorted keys (B, Hkv, D, S) = {(shape.B, shape.Hkv, shape.D, shape.S)}"
            raise mismatch("prepared", expected, prepared.values)
        return prepared

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the blocks of queries: which they are, and (B, Hkv, G·Lb, D)."""
        for start in range(0, self.shape.L, self.size):
            rows = slice(start, min(start + self.size, self.shape.L))
            yield rows, self.q[:, :, rows].reshape(self.shape.B, self.heads, -1, self.shape.D)

    def unstack(self, x: Tensor) -> Tensor:
        """(B, Hkv, G·Lb[, X]) → (B, H, Lb[, X])."""
        return x.reshape(self.shape.B, self.shape.H, -1, *x.shape[3:])

    def select(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Search for a block: candidates, products made, the candidates' index (…, C), scores, and which are kept."""
        with torch.no_grad():
            chosen, made = _candidates(q.detach() * math.copysign(1.0, self.scale), self.ordered, self.iterations)
            most = max(1, int(chosen.sum(-1).max()))
            found = chosen.to(q.dtype).topk(most)  # C = most: as many places as the greediest query needs
        scores = (take(self.k, found.indices) @ q[..., None])[..., 0] * self.scale
        scores = scores.masked_fill(found.values == 0, -math.inf)
        kept = scores >= scores.amax(-1, keepdim=True) + self.log_threshold
        return chosen, made, found.indices, scores, kept & (found.values > 0)


def a3_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    iterations: int,
    threshold: float = 0.0,
    prepared: SortedKeys | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 128,
) -> Tensor:
    """Compute softmax attention over the keys that a greedy search on single components finds.

    {cite}`ham2020`, §IV. Search: of all products q_d · k_sd, the ``iterations`` largest positive and as many smallest
    negative ones are added up for each key; keys with a positive sum are candidates. The products are found without
    making the others, by two pointers into each sorted component. Selection: of the candidates, scored exactly, those
    are kept whose weight is at least ``threshold`` of the largest. With iterations ≥ S·D all keys of positive
    score are candidates.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        iterations: M, how many of the largest and of the smallest products each query looks at.
        threshold: T in [0, 1), share of the largest weight below which a candidate is dropped.
        prepared: of :func:`sort_keys`, from the same keys; sorted anew where not given.
        attn_mask: (…, 1, S), bool, broadcastable to (B, H, 1, S); True = may be attended to.
        is_causal: must be False; for decoding, call with one query at a time.
        scale: factor of the scores; 1/√D by default.
        block_size: how many queries are searched for at a time.
    Returns:
        (B, H, L, Dv), dtype of query. Gradients pass through the kept scores, not through the choice.
    Raises:
        ValueError: shapes or types that do not match, NaN, a size below 1, a threshold outside [0, 1), is_causal.
    Cost: O(S·D·log S) to prepare; then O(L·(iterations·D + C·(D + Dv) + S)) time with C ≤ iterations candidates, of
    which 2·(D + iterations) + C·D + C·Dv a query are multiplications at most; O(block_size·(S + C·D)) memory, with
    gradients O(L·C·D).
    Differs from the paper: real numbers instead of fixed point, an exact exponential instead of tables; a query left
    without candidates takes the key of highest greedy score (0 for keys never visited, the first among equals).
    """
    never_causal(is_causal, "topk_attention, lsh_attention, routing_attention")
    call = _Call(query, key, value, iterations, threshold, prepared, attn_mask, scale, block_size)
    outputs = []
    for _, q in call.blocks():
        _, _, index, scores, kept = call.select(q)
        weights = softmax(scores, mask=kept)  # (B, Hkv, R, C)
        outputs.append(call.unstack((weights[..., None, :] @ take(call.v, index))[..., 0, :]))
    return torch.cat(outputs, 2).to(query.dtype)


class A3Selection(NamedTuple):
    """What the search of :func:`a3_selection` found, and what it took.

    Attributes:
        candidates: (B, H, L, S) bool, the keys scored exactly.
        kept: (B, H, L, S) bool, those of them that share the softmax.
        products: (B, H, L) int64, multiplications of the search.
    """

    candidates: Tensor
    kept: Tensor
    products: Tensor

    def multiplications(self, head_dim: int, value_dim: int) -> Tensor:
        """Count the multiplications of each query: search, exact scores of candidates, mixing of what was kept.

        Args:
            head_dim: D.
            value_dim: Dv.
        Returns:
            (B, H, L) int64, to compare with S·(D + Dv) of exact attention.
        """
        return self.products + self.candidates.sum(-1) * head_dim + self.kept.sum(-1) * value_dim


def a3_selection(
    query: Tensor,
    key: Tensor,
    *,
    iterations: int,
    threshold: float = 0.0,
    prepared: SortedKeys | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
) -> A3Selection:
    """Report which keys :func:`a3_attention` would attend to, and its work; for study, since it fills L × S masks.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        iterations: as for :func:`a3_attention`.
        threshold: as for :func:`a3_attention`.
        prepared: as for :func:`a3_attention`.
        attn_mask: as for :func:`a3_attention`.
        scale: as for :func:`a3_attention`.
        block_size: as for :func:`a3_attention`.
    Returns:
        Candidates, kept keys and products made.
    Raises:
        ValueError: as for :func:`a3_attention`.
    """
    with torch.no_grad():
        call = _Call(query, key, key, iterations, threshold, prepared, attn_mask, scale, block_size)
        parts = []
        for _, q in call.blocks():
            chosen, made, index, _, kept = call.select(q)
            survivors = torch.zeros_like(chosen).scatter_(-1, index, kept)
            parts.append([call.unstack(x) for x in (chosen, survivors, made)])
    candidates, kept, products = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return A3Selection(candidates, kept, products)
