"""Data-informed sparsity: one fixed pattern a head, from the attention weights seen on data."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_pair_mask, widen, working_type
from attnbook.normalizers import softmax
from attnbook.scores import scaled_dot
from attnbook.shapes import check_count, check_mask, check_tensor, describe, mismatch


class AttentionAverage:
    """The mean of attention weights over many batches, for each head and pair of positions ({cite}`rugina2020`).

    Sequences may be shorter than the pattern; they count where they reach.

    Args:
        heads: H.
        L: most queries.
        S: most keys; L by default.
    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, heads: int, L: int, S: int | None = None):
        S = L if S is None else S
        for name, size in (("heads", heads), ("L", L), ("S", S)):
            check_count(name, size)
        self.total = torch.zeros(heads, L, S, dtype=torch.float64)
        self.count = torch.zeros(L, S, dtype=torch.int64)

    def add(self, weights: Tensor) -> None:
        """Take in a batch of weights (B, H, l, s), l ≤ L and s ≤ S, aligned at their first positions."""
        check_tensor("weights", weights, "B H L S")
        heads, most_queries, most_keys = self.total.shape
        batch, _, length, keys = weights.shape
        if weights.shape[1] != heads or length > most_queries or keys > most_keys:
            raise mismatch("weights", f"(B, {heads}, at most {most_queries}, at most {most_keys})", weights)
        self.total[:, :length, :keys] += weights.detach().sum(0, dtype=torch.float64).to(self.total.device)
        self.count[:length, :keys] += batch

    def mean(self) -> Tensor:
        """Return the mean weights (H, L, S), float64; 0 for pairs that no sequence reached."""
        return self.total / self.count.clamp(min=1)


def _how_many(density: float, allowed: Tensor) -> int:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise mismatch("density", "a number in (0, 1]", describe(density))
    return round(density * int(allowed.sum()))


def _allowed(allowed: Tensor | None, L: int, S: int, device: torch.device | None) -> Tensor:
    if allowed is None:
        return torch.ones(L, S, dtype=torch.bool, device=device)
    return check_mask("allowed", allowed, (L, S), "L S").expand(L, S)


def _keep_largest(ranks: Tensor, allowed: Tensor, density: float, share_heads: bool) -> Tensor:
    """Keep the entries of largest rank, of each head or of all heads together; exactly as many as the density says."""
    heads = ranks.shape[0]
    allowed = allowed.expand_as(ranks)
    groups = (1, -1) if share_heads else (heads, -1)
    ranks = ranks.masked_fill(~allowed, -torch.inf).reshape(groups)
    kept = torch.zeros_like(ranks, dtype=torch.bool)
    number = _how_many(density, allowed.reshape(groups)[0])
    return kept.scatter_(-1, ranks.topk(number).indices, True).view(allowed.shape)


def pattern_at_density(
    average: Tensor, density: float, *, allowed: Tensor | None = None, across_heads: bool = True
) -> Tensor:
    """Keep the pairs of positions with the largest average weights.

    {cite}`rugina2020`; as in the authors' code, one threshold serves all heads of a layer, so heads that look at few
    places keep less. Differs from it: exactly so many pairs are kept as the density says, ties or not.

    Args:
        average: (H, L, S), what ``AttentionAverage.mean`` returns.
        density: share of the allowed pairs to keep, in (0, 1].
        allowed: broadcastable to (L, S), bool, the pairs there are to choose from, a causal mask say; all by default.
        across_heads: rank the pairs of all heads together; else each head keeps equally many.
    Returns:
        (H, L, S) bool, True = attend.
    Raises:
        ValueError: shapes or types that do not match, NaN, a density outside (0, 1].
    """
    check_tensor("average", average, "H L S")
    if bool(average.isnan().any()):
        raise mismatch("average", "no NaN", f"{int(average.isnan().sum())} NaN of {average.numel()} elements")
    return _keep_largest(average, _allowed(allowed, *average.shape[1:], average.device), density, across_heads)


def random_pattern(
    heads: int,
    L: int,
    S: int | None = None,
    *,
    density: float,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep pairs at random: what a data-informed pattern of the same density has to beat.

    Args:
        heads: H.
        L: number of queries.
        S: number of keys; L by default.
        density: share of the allowed pairs to keep, in (0, 1]; each head keeps equally many.
        allowed: broadcastable to (L, S), bool; all pairs by default.
        generator: of the random numbers.
    Returns:
        (H, L, S) bool.
    Raises:
        ValueError: a size below 1, a density outside (0, 1], a mask that does not fit.
    """
    S = L if S is None else S
    for name, size in (("heads", heads), ("L", L), ("S", S)):
        check_count(name, size)
    device = None if generator is None else generator.device
    ranks = torch.rand(heads, L, S, generator=generator, device=device)
    return _keep_largest(ranks, _allowed(allowed, L, S, device), density, False)


def data_informed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 64,
) -> Tensor:
    """Compute softmax attention over the pairs of a fixed pattern, the same for all inputs.

    {cite}`rugina2020`. Queries are taken in blocks; the keys that no query of a block attends to are never touched, so
    time and memory follow the number of columns in use, block by block: little where the pattern has runs and stripes,
    as patterns from data have, and much where it is random.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        pattern: broadcastable to (H, L, S), bool, True = attend; from :func:`pattern_at_density`, say.
        attn_mask: broadcastable to (B, H, L, S), bool; True = may attend.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        scale: factor of the scores; 1/√D by default.
        block_size: how many queries share a choice of columns.
    Returns:
        (B, H, L, Dv), dtype of query; 0 where a query has nothing to attend to.
    Raises:
        ValueError: shapes or types that do not match, NaN, block_size below 1.
    Cost: O(P·D) time and O(P) memory, P the pairs of the blocks and their columns in use: between the pattern's own
    number and L·S.
    Differs from the paper: there models are trained again under the pattern; training is not this function's business.
    """
    shape = check_call(query, key, value)
    mask = check_pair_mask(attn_mask, shape)
    check_count("block_size", block_size)
    pattern = check_mask("pattern", pattern, (shape.H, shape.L, shape.S), "H L S").expand(-1, shape.L, shape.S)
    wide = query.to(working_type(query))
    key, value = widen(key, shape), widen(value, shape)
    outputs = []
    for start in range(0, shape.L, block_size):
        rows = slice(start, min(start + block_size, shape.L))
        tiles = pattern[:, rows]  # (H or 1, Lb, S)
        if is_causal:
            last = torch.arange(start, rows.stop, device=query.device)[:, None] + (shape.S - shape.L)
            tiles = tiles & (torch.arange(shape.S, device=query.device) <= last)
        heads = [slice(None)] if len(tiles) == 1 else [slice(h, h + 1) for h in range(shape.H)]
        block = []
        for tile, h in zip(tiles, heads, strict=True):
            used = tile.any(0).nonzero()[:, 0]  # the columns in use
            allowed = tile[:, used]
            if mask is not None:
                allowed = allowed & mask.expand(-1, shape.H, shape.L, shape.S)[:, h, rows][..., used]
            block.append(_attend(wide[:, h, rows], key[:, h, used], value[:, h, used], allowed, scale))
        outputs.append(torch.cat(block, 1))
    return torch.cat(outputs, 2).to(query.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None) -> Tensor:
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return softmax(scaled_dot(q, k, scale=scale), mask=allowed) @ v
