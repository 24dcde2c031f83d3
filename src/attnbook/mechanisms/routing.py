"""Routing attention: compare queries with keys of the same cluster, found by online k-means."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, widen, working_type
from attnbook.mechanisms.gather import take
from attnbook.normalizers import softmax
from attnbook.shapes import AttentionShape, check_count, check_probability, check_tensor, mismatch


def _check_centroids(centroids: Tensor, shape: AttentionShape) -> Tensor:
    check_tensor("centroids", centroids, "H C D")
    if centroids.shape[0] not in (1, shape.H) or centroids.shape[2] != shape.D:
        raise mismatch("centroids", f"(H or 1, C, D) with H = {shape.H}, D = {shape.D}", centroids)
    return centroids


def _closeness(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the product of each vector's direction with each centroid: (B, H, L, C), without gradient."""
    return F.normalize(x.detach(), dim=-1) @ centroids.detach().to(x.dtype).transpose(-1, -2)


def draw_centroids(heads: int, num_clusters: int, head_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw centroids to start from: directions spread evenly.

    Args:
        heads: H.
        num_clusters: C.
        head_dim: D.
        generator: of the random numbers.
    Returns:
        (H, C, D) float32, each of length 1.
    Raises:
        ValueError: a size below 1.
    """
    for name, size in (("heads", heads), ("num_clusters", num_clusters), ("head_dim", head_dim)):
        check_count(name, size)
    device = None if generator is None else generator.device
    return F.normalize(torch.randn(heads, num_clusters, head_dim, generator=generator, device=device), dim=-1)


def update_centroids(
    centroids: Tensor, query: Tensor, key: Tensor, *, decay: float = 0.999, attn_mask: Tensor | None = None
) -> Tensor:
    """Move each centroid towards the vectors that lie closest to it: a step of online k-means on the sphere.

    In the manner of {cite}`roy2021`: μ becomes λ μ + (1 − λ) · (mean of the queries and keys nearest to μ), λ the
    decay. Members count by their direction and centroids keep length 1, so the step depends neither on lengths nor on
    how many members there are; a cluster without any stays where it is.

    Args:
        centroids: (H, C, D).
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        decay: λ in [0, 1); 0 is a step of plain spherical k-means.
        attn_mask: (…, 1, S), bool; hidden positions are left out, of the keys and, where L = S, of the queries.
    Returns:
        (H, C, D), dtype of the centroids, without gradient; the argument is left as it is.
    Raises:
        ValueError: shapes that do not match, a decay outside [0, 1).
    """
    shape = check_call(query, key, key)
    mask = check_key_mask(attn_mask, shape)
    if _check_centroids(centroids, shape).shape[0] != shape.H:
        raise mismatch("centroids", f"(H, C, D) with H = {shape.H}", centroids)
    check_probability("decay", decay)
    total = torch.zeros_like(centroids, dtype=working_type(query))
    count = torch.zeros_like(total[..., :1])
    for x, hide in ((query.to(total.dtype), mask if shape.L == shape.S else None), (widen(key, shape), mask)):
        member = F.one_hot(_closeness(x, centroids).argmax(-1), centroids.shape[1]).to(total.dtype)  # (B, H, L, C)
        if hide is not None:
            member = member * hide.transpose(-1, -2)
        total += torch.einsum("bhlc,bhld->hcd", member, F.normalize(x.detach(), dim=-1))
        count += member.sum((0, 2))[..., None]
    old = centroids.detach().to(total.dtype)
    moved = F.normalize(decay * old + (1 - decay) * total / count.clamp(min=1), dim=-1)
    return torch.where(count > 0, moved, old).to(centroids.dtype)


def _members(x: Tensor, centroids: Tensor, window: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the positions closest to each centroid, and which of them are not hidden: (B, H, C, w) each."""
    closeness = _closeness(x, centroids).transpose(-1, -2)  # (B, H, C, L)
    if mask is not None:
        closeness = closeness.masked_fill(~mask, -math.inf)
    best = closeness.topk(window)
    return best.indices, best.values > -math.inf


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    centroids: Tensor | None = None,
    num_clusters: int | None = None,
    window: int | None = None,
    generator: torch.Generator | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax attention within clusters: the queries and keys that lie closest to the same centroid.

    {cite}`roy2021`. Each centroid takes the ``window`` queries and the ``window`` keys whose directions agree best
    with it, so clusters are equally large, a position may be in several, and some are in none. A query's output is
    the mean over the clusters in which it finds a key, and 0 where there is none. Centroids learn by
    :func:`update_centroids`, not by gradient.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        centroids: (H, C, D), or (1, C, D) for all heads; drawn by :func:`draw_centroids` where not given.
        num_clusters: C, where no centroids are given.
        window: members of a cluster, at most L; L / C by default, rounded up.
        generator: of the random numbers.
        attn_mask: (…, 1, L), bool, broadcastable to (B, H, 1, L). A hidden position takes part neither as a key nor as
            a query; its output is 0.
        is_causal: let each query see its own position and earlier ones. Which positions a cluster takes still depends
            on later ones.
        scale: factor of the scores; 1/√D by default.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes or types that do not match, L ≠ S, NaN, a size below 1, neither centroids nor their number.
    Cost: O(L·D·C + C·window²·D) time, O(C·window·(window + D)) memory: O(L^1.5·D) and O(L^1.5) with C = √L.
    Differs from the paper: there queries and keys go through a layer norm without gain and bias first (here that is the
    caller's), the causal form shares queries and keys, and the rest of the heads attend locally.
    """
    shape = check_call(query, key, value, equal_lengths=True)
    mask = check_key_mask(attn_mask, shape)
    q = query.to(working_type(query))
    k, v = widen(key, shape), widen(value, shape)
    if centroids is None:
        if num_clusters is None:
            raise mismatch("num_clusters", "an integer ≥ 1, where no centroids are given", None)
        centroids = draw_centroids(shape.H, num_clusters, shape.D, generator=generator).to(q.device)
    clusters = _check_centroids(centroids, shape).shape[1]
    if num_clusters not in (None, clusters):
        raise mismatch("num_clusters", f"{clusters}, as the centroids have it, or nothing", num_clusters)
    window = min(shape.L, math.ceil(shape.L / clusters) if window is None else check_count("window", window))

    q_at, q_real = _members(q, centroids, window, mask)  # (B, H, C, w)
    k_at, k_real = _members(k, centroids, window, mask)
    scores = take(q, q_at) @ take(k, k_at).transpose(-1, -2)  # (B, H, C, w, w)
    allowed = q_real[..., None] & k_real[..., None, :]
    if is_causal:
        allowed &= k_at[..., None, :] <= q_at[..., None]
    weights = softmax(scores * (shape.D**-0.5 if scale is None else scale), mask=allowed)
    mixed = weights @ take(v, k_at)  # (B, H, C, w, Dv)

    at = q_at.flatten(2)[..., None]  # (B, H, C·w, 1)
    found = allowed.any(-1).flatten(2)[..., None].to(mixed.dtype)
    count = torch.zeros_like(q[..., :1]).scatter_add_(2, at, found)
    output = torch.zeros_like(v).scatter_add(2, at.expand(-1, -1, -1, shape.Dv), mixed.flatten(2, 3))
    return (output / count.clamp(min=1)).to(query.dtype)
