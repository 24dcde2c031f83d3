"""LSH attention (the Reformer's): compare queries only with keys that fall into the same bucket of a random hash."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, widen, working_type
from attnbook.mechanisms.gather import take
from attnbook.shapes import check_count, check_tensor, mismatch

SELF_PENALTY = 1e5  # taken off a query's score with its own position: it then counts only where there is no other


def lsh_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Hash vectors by their direction: the index of the largest of (x R, −x R).

    {cite}`andoni2015`, as {cite}`kitaev2020`, §2, uses it. With two buckets, two vectors at an angle θ share theirs
    with probability 1 − θ/π; with any number b, the probability is 1 at θ = 0, 1/b at a right angle and 0 at θ = π.

    Args:
        x: (…, L, D) float; its length does not matter.
        rotations: (num_hashes, D, num_buckets / 2), random normal numbers.
    Returns:
        (…, num_hashes, L) int64, in [0, num_buckets).
    Raises:
        ValueError: shapes that do not match.
    Cost: O(L·D·num_buckets·num_hashes) time; with the usual number of buckets, which grows with L, this is quadratic.
    Differs from the paper: the random matrices are not made orthogonal, nor do the authors of the Reformer do so.
    """
    check_tensor("x", x, "... L D")
    _check_rotations(rotations, x.shape[-1])
    x, half = x.detach(), rotations.shape[-1]
    rotations = rotations.detach().to(x.dtype)
    found = []
    for rotation in rotations:
        turned = x @ rotation  # (…, L, num_buckets / 2)
        axis = turned.abs().argmax(-1, keepdim=True)
        found.append((axis + half * (turned.gather(-1, axis) < 0))[..., 0])
    return torch.stack(found, -2)


def _check_rotations(rotations: Tensor, head_dim: int) -> None:
    check_tensor("rotations", rotations, "num_hashes D half")
    if rotations.shape[1] != head_dim:
        raise mismatch("rotations", f"(num_hashes, D = {head_dim}, num_buckets / 2)", rotations)


def _resolve_rotations(
    rotations: Tensor | None,
    num_buckets: int | None,
    num_hashes: int | None,
    generator: torch.Generator | None,
    like: Tensor,
) -> Tensor:
    """Check the random matrices, or draw them."""
    if num_buckets is not None and (check_count("num_buckets", num_buckets, least=2) % 2):
        raise mismatch("num_buckets", "an even number: each random axis gives two buckets", num_buckets)
    if num_hashes is not None:
        check_count("num_hashes", num_hashes)
    if rotations is None:
        if num_buckets is None:
            raise mismatch("num_buckets", "an even integer ≥ 2, where no rotations are given", None)
        size = (num_hashes or 4, like.shape[-1], num_buckets // 2)
        device = like.device if generator is None else generator.device
        return torch.randn(size, generator=generator, dtype=like.dtype, device=device).to(like.device)
    _check_rotations(rotations, like.shape[-1])
    for name, given, has in (
        ("num_buckets", num_buckets, 2 * rotations.shape[2]),
        ("num_hashes", num_hashes, rotations.shape[0]),
    ):
        if given not in (None, has):
            raise mismatch(name, f"{has}, as the rotations have it, or nothing", given)
    return rotations


class _Sorted:
    """Positions sorted by bucket in every round of hashing, in chunks, with the chunks before them.

    Shapes: R rounds, T chunks of c positions.
    """

    def __init__(self, buckets: Tensor, chunk: int):
        self.buckets = buckets  # (B, H, R, L)
        self.order = buckets.argsort(stable=True)  # (B, H, R, L): the position at each place
        places = torch.arange(buckets.shape[-1], device=buckets.device).expand_as(self.order)
        self.place = torch.empty_like(self.order).scatter_(-1, self.order, places)  # the place of each position
        self.chunk_of = self.place // chunk
        short = -buckets.shape[-1] % chunk
        self.at = F.pad(self.order, (0, short)).unflatten(-1, (-1, chunk))  # (B, H, R, T, c)
        self.real = F.pad(torch.ones_like(self.order, dtype=torch.bool), (0, short)).unflatten(-1, (-1, chunk))

    def look_back(self, chunks: int) -> tuple[Tensor, Tensor]:
        """Return positions, and which are real, of each chunk and of those before it: (B, H, R, T, (1 + chunks)·c)."""
        total = self.at.shape[3]
        found = []
        for x in (self.at, self.real):
            x = F.pad(x, (0, 0, chunks, 0))
            found.append(torch.cat([x[:, :, :, i : i + total] for i in range(chunks + 1)], -1))
        return found[0], found[1]


def _meet(
    queries: _Sorted, keys: _Sorted, r: int, q_at: Tensor, k_at: Tensor, look_back: int, across_buckets: bool
) -> Tensor:
    """Tell which queries and keys meet in round r: (B, H, R, T, c, m) for positions (…, c) and (…, m)."""
    behind = take(queries.chunk_of[:, :, r], q_at)[..., None] - take(keys.chunk_of[:, :, r], k_at)[..., None, :]
    meet = (behind >= 0) & (behind <= look_back)
    if not across_buckets:
        meet &= take(queries.buckets[:, :, r], q_at)[..., None] == take(keys.buckets[:, :, r], k_at)[..., None, :]
    return meet


def lsh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_buckets: int | None = None,
    num_hashes: int | None = None,
    chunk_size: int | None = None,
    look_back: int = 1,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    self_last: bool = False,
    across_buckets: bool = False,
    count_once: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax attention over the keys that share a bucket with the query in some round of hashing.

    {cite}`kitaev2020`, §2 and appendix A. In each round queries and keys are sorted by bucket, then by position, and
    cut into chunks; a query is compared with the keys of its bucket in the chunk of the same number and in
    ``look_back`` chunks before it. The rounds' results are mixed with weights exp(zᵣ) / Σ exp(z), zᵣ the logarithm of
    a round's sum; a pair that meets in n rounds counts 1/n in each, so the whole is one softmax over the union.

    For the paper's shared queries and keys pass ``key = torch.nn.functional.normalize(query, dim=-1)`` and
    ``self_last=True``.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        num_buckets: even; need not be given where rotations are.
        num_hashes: rounds; 4 by default.
        chunk_size: positions in a chunk; 2·L / num_buckets by default, rounded up. The last chunk may be shorter.
        look_back: how many earlier chunks a chunk sees.
        rotations: (num_hashes, D, num_buckets / 2), the same for all heads; drawn from the normal distribution by
            default.
        generator: of the random numbers.
        self_last: let a query attend to its own position only where it has nothing else.
        across_buckets: compare with all keys of the chunks, whatever their buckets, as the authors' code does.
        count_once: False lets a pair count in full in each round where it meets, which is cheaper.
        attn_mask: (…, 1, L), bool, broadcastable to (B, H, 1, L). A hidden position takes part neither as a key nor as
            a query; its output is 0.
        is_causal: let each query see its own position and earlier ones. The buckets' sizes, and with them the chunks,
            still depend on later positions.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query; 0 where a query meets no key. The hash passes no gradient.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, NaN, an odd number of buckets, a size below 1.
    Cost: O(num_hashes·L·(chunk_size·(D + num_hashes) + num_buckets·D)) time, O(num_hashes·L·(chunk_size + D)) memory.
    Differs from the paper: queries and keys may differ, and then a query's bucket and its keys' may come to lie in
    different chunks; lengths need not divide; the first chunk looks back at nothing (in the authors' code, at the last
    chunk of the round before).
    """
    shape = check_call(query, key, value, equal_lengths=True)
    mask = check_key_mask(attn_mask, shape)
    check_count("look_back", look_back, least=0)
    q = query.to(working_type(query))
    k, v = widen(key, shape), widen(value, shape)
    rotations = _resolve_rotations(rotations, num_buckets, num_hashes, generator, q)
    rounds, num_buckets = rotations.shape[0], 2 * rotations.shape[2]
    chunk = math.ceil(2 * shape.L / num_buckets) if chunk_size is None else check_count("chunk_size", chunk_size)
    buckets = [lsh_buckets(x, rotations) for x in (q, k)]  # (B, H, R, L) each
    if mask is not None:  # hidden positions go to a bucket of their own, the last
        buckets = [b.masked_fill(~mask, num_buckets) for b in buckets]
    queries, keys = (_Sorted(b, chunk) for b in buckets)
    q_at = queries.at  # (B, H, R, T, c)
    k_at, k_real = keys.look_back(look_back)  # (B, H, R, T, m)
    scores = take(q, q_at) @ take(k, k_at).transpose(-1, -2)  # (B, H, R, T, c, m)
    scores = scores * (shape.D**-0.5 if scale is None else scale)

    counts = count_once and rounds > 1
    here = torch.zeros_like(scores, dtype=torch.bool)  # whether a pair meets in the round in which it is compared
    meetings = torch.zeros_like(scores, dtype=torch.int16) if counts else None  # in how many rounds it does
    for r in range(rounds):
        compared = slice(None) if counts else slice(r, r + 1)
        meet = _meet(queries, keys, r, q_at[:, :, compared], k_at[:, :, compared], look_back, across_buckets)
        here[:, :, r] = meet[:, :, r if counts else 0]
        if counts:
            meetings += meet
    if mask is not None:
        here &= take(mask.expand(shape.B, shape.H, 1, shape.L)[:, :, 0], q_at)[..., None]
        here &= take(mask.expand(shape.B, shape.H, 1, shape.L)[:, :, 0], k_at)[..., None, :]
    here &= k_real[..., None, :]
    if is_causal:
        here &= k_at[..., None, :] <= q_at[..., None]
    if counts:
        scores = scores - meetings.clamp_(min=1).to(scores.dtype).log()
    if self_last:
        scores = scores - SELF_PENALTY * (k_at[..., None, :] == q_at[..., None])
    scores = scores.masked_fill(~here, -math.inf)

    top = scores.detach().amax(-1, keepdim=True)  # (B, H, R, T, c, 1)
    p = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
    total, mixed = p.sum(-1, keepdim=True), p @ take(v, k_at)
    top, total, mixed = (_unsort(x, queries.place) for x in (top, total, mixed))  # (B, H, R, L, 1 or Dv)
    highest = top.amax(2, keepdim=True)
    share = (top - highest.masked_fill(highest == -math.inf, 0.0)).exp()  # of a round, before division by the sum
    total, mixed = (share * total).sum(2), (share * mixed).sum(2)
    return (mixed / total.where(total > 0, 1.0)).to(query.dtype)


def _unsort(x: Tensor, place: Tensor) -> Tensor:
    """Bring (B, H, R, T, c, X) back into the order of positions: (B, H, R, L, X)."""
    x = x.flatten(3, 4)
    return x.gather(3, place[..., None].expand(*place.shape, x.shape[-1]))
