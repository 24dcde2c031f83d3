"""Sparse attention whose pattern comes from the content, in NumPy: which pairs count, by loops; then their softmax."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.reference.dense import attention

Array = NDArray[np.float64]


def _scores(query: ArrayLike, key: ArrayLike, scale: float | None) -> Array:
    """Return the scores of every pair, (B, H, L, S)."""
    q, k = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("bhld,bhsd->bhls", q, k) * (1 / np.sqrt(q.shape[3]) if scale is None else scale)


def _visible(shape: tuple[int, ...], attn_mask: ArrayLike | None, is_causal: bool) -> NDArray[np.bool_]:
    """Return which pairs the masks allow, (B, H, L, S)."""
    allowed = np.ones(shape, dtype=bool)
    if attn_mask is not None:
        allowed &= np.asarray(attn_mask)
    if is_causal:
        allowed &= np.arange(shape[3]) <= np.arange(shape[2])[:, None] + (shape[3] - shape[2])
    return allowed


def topk_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    k: int,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Compute softmax over the k largest allowed scores of each row; those equal to the k-th are all kept.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        k: how many keys a query keeps.
        attn_mask: broadcastable to (B, H, L, S), bool.
        is_causal: as for :func:`attention`.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    scores = _scores(query, key, scale)
    kept = _visible(scores.shape, attn_mask, is_causal)
    for row in np.ndindex(scores.shape[:3]):
        ordered = np.sort(scores[row][kept[row]])
        if len(ordered) > k:
            kept[row] &= scores[row] >= ordered[-k]
    return attention(query, key, value, attn_mask=kept, scale=scale)


def lsh_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    rotations: ArrayLike,
    chunk_size: int | None = None,
    look_back: int = 1,
    self_last: bool = False,
    across_buckets: bool = False,
    count_once: bool = True,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Compute softmax over the pairs that meet in some round of hashing.

    In a round, queries and keys are each sorted by bucket, hidden ones last, equal ones by position. The query at
    place i meets the key at place j if they share a bucket and floor(i / chunk) − floor(j / chunk) is 0, 1, … or
    look_back. A pair that meets n times gets the score + log n, or + 0 with count_once.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        rotations: (num_hashes, D, num_buckets / 2).
        chunk_size: places in a chunk; 2·L / num_buckets by default, rounded up.
        look_back: how many earlier chunks a chunk sees.
        self_last: let a query attend to its own position only where it meets no other.
        across_buckets: let pairs meet whatever their buckets.
        count_once: count a pair once, in however many rounds it meets.
        attn_mask: broadcastable to (B, H, 1, L), bool; False hides a position, as a key and as a query.
        is_causal: as for :func:`attention`.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, turns = (np.asarray(x, dtype=np.float64) for x in (query, key, rotations))
    B, H, L, _ = q.shape
    k = np.repeat(k, H // k.shape[1], axis=1)
    chunk = -(-L // turns.shape[2]) if chunk_size is None else chunk_size
    hidden = np.zeros((B, H, L), dtype=bool)
    if attn_mask is not None:
        hidden |= ~np.broadcast_to(np.asarray(attn_mask), (B, H, 1, L))[:, :, 0]
    meetings = np.zeros((B, H, L, L))
    for b, h, r in np.ndindex(B, H, len(turns)):
        bucket, where = [], []
        for x in (q[b, h], k[b, h]):
            turned = x @ turns[r]
            buckets = np.concatenate([turned, -turned], axis=-1).argmax(-1)
            buckets[hidden[b, h]] = 2 * turns.shape[2]
            place = np.empty(L, dtype=int)
            place[np.argsort(buckets, kind="stable")] = np.arange(L)
            bucket.append(buckets)
            where.append(place // chunk)
        behind = where[0][:, None] - where[1]
        meet = (behind >= 0) & (behind <= look_back)
        if not across_buckets:
            meet &= bucket[0][:, None] == bucket[1]
        meetings[b, h] += meet
    meetings[hidden] = 0
    meetings[np.broadcast_to(hidden[:, :, None], meetings.shape)] = 0
    allowed = (meetings > 0) & _visible(meetings.shape, None, is_causal)
    if self_last:
        itself = np.eye(L, dtype=bool)
        alone = ~(allowed & ~itself).any(-1, keepdims=True)
        allowed &= ~itself | alone
    bias = np.zeros_like(meetings) if count_once else np.log(np.maximum(meetings, 1))
    return attention(query, key, value, attn_mask=allowed, bias=bias, scale=scale)


def routing_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    centroids: ArrayLike,
    window: int | None = None,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Compute softmax attention within each cluster, and average over the clusters in which a query finds a key.

    A cluster is the ``window`` queries, and the ``window`` keys, whose directions have the largest product with its
    centroid; hidden positions belong to none.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        centroids: (H or 1, C, D).
        window: members of a cluster; L / C by default, rounded up.
        attn_mask: broadcastable to (B, H, 1, L), bool; False hides a position.
        is_causal: as for :func:`attention`.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k, v, mu = (np.asarray(x, dtype=np.float64) for x in (query, key, value, centroids))
    B, H, L, _ = q.shape
    k, v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
    C = mu.shape[1]
    size = min(L, -(-L // C) if window is None else window)
    seen = np.ones((B, H, L), dtype=bool)
    if attn_mask is not None:
        seen &= np.broadcast_to(np.asarray(attn_mask), (B, H, 1, L))[:, :, 0]
    scores = _scores(q, k, scale)
    visible = _visible(scores.shape, None, is_causal)
    total, count = np.zeros_like(v), np.zeros((B, H, L))
    for b, h, c in np.ndindex(B, H, C):
        members = []
        for x in (q[b, h], k[b, h]):
            closeness = (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ mu[h % len(mu), c]
            order = np.argsort(-np.where(seen[b, h], closeness, -np.inf), kind="stable")[:size]
            members.append([i for i in order if seen[b, h, i]])
        for i in members[0]:
            keys = [j for j in members[1] if visible[b, h, i, j]]
            if keys:
                weights = np.exp(scores[b, h, i, keys] - scores[b, h, i, keys].max())
                total[b, h, i] += weights / weights.sum() @ v[b, h, keys]
                count[b, h, i] += 1
    return total / np.maximum(count, 1)[..., None]


def a3_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    iterations: int,
    threshold: float = 0.0,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Array:
    """Compute softmax over the keys that have a positive sum of extreme products, and enough weight.

    All products q_d · k_sd are made and sorted here. The ``iterations`` largest positive and smallest negative ones
    count; of equal ones those of earlier components, and within a component those of keys that come first when one
    walks through its sorted values, upwards or downwards as the query's sign says.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        iterations: how many of the largest and of the smallest products count.
        threshold: share of the largest weight below which a candidate is dropped.
        attn_mask: broadcastable to (B, H, 1, S), bool.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    q, k = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = _scores(q, k, scale)
    visible = _visible(scores.shape, attn_mask, False)
    kept = np.zeros_like(visible)
    sign = 1.0 if scale is None or scale >= 0 else -1.0
    for b, h in np.ndindex(scores.shape[:2]):
        rows = np.flatnonzero(visible[b, h, 0])
        if not len(rows):
            continue
        products = sign * q[b, h, :, :, None] * k[b, h, rows].T  # (L, D, keys)
        greedy = np.zeros(scores.shape[2:])
        for direction in (1, -1):  # the largest, then the smallest
            upwards = ((sign * q[b, h] < 0) == (direction == 1))[:, :, None]
            row = np.where(upwards, rows, rows[::-1]).reshape(len(products), -1)
            walk = np.where(upwards, products, products[:, :, ::-1]).reshape(row.shape) * direction
            first = np.argsort(-walk, axis=1, kind="stable")[:, :iterations]
            for i, at in enumerate(first):
                np.add.at(greedy[i], row[i, at], direction * np.maximum(walk[i, at], 0))
        for i, z in enumerate(scores[b, h]):
            chosen = rows[greedy[i, rows] > 0]
            if not len(chosen):
                chosen = rows[[greedy[i, rows].argmax()]]
            with np.errstate(divide="ignore"):
                kept[b, h, i, chosen] = z[chosen] >= z[chosen].max() + np.log(threshold)
    return attention(query, key, value, attn_mask=kept, scale=scale)


def data_informed_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    pattern: ArrayLike,
    attn_mask: ArrayLike | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Array:
    """Compute softmax over the pairs of a fixed pattern.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        pattern: broadcastable to (H, L, S), bool.
        attn_mask: broadcastable to (B, H, L, S), bool.
        is_causal: as for :func:`attention`.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv) float64.
    """
    shape = (*np.shape(query)[:3], np.shape(key)[2])
    allowed = _visible(shape, attn_mask, is_causal) & np.asarray(pattern)
    return attention(query, key, value, attn_mask=allowed, scale=scale)
