"""Graph attention in NumPy, node by node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _attend(x: Array, edge_index: ArrayLike, self_loops: bool, score: Callable[[int, int, int], float]) -> Array:
    """Average over each node's incoming edges, weighted by softmax of ``score(head, source, target)``."""
    N, H, _ = x.shape
    edges = [(int(j), int(i)) for j, i in np.asarray(edge_index).T]
    if self_loops:
        edges = [(j, i) for j, i in edges if j != i] + [(i, i) for i in range(N)]
    output = np.zeros_like(x)
    for i in range(N):
        sources = [j for j, target in edges if target == i]
        for h in range(H if sources else 0):
            e = np.array([score(h, j, i) for j in sources])
            weights = np.exp(e - e.max())
            weights /= weights.sum()
            output[i, h] = sum(w * x[j, h] for w, j in zip(weights, sources, strict=True))
    return output


def _leaky_relu(x: Array | float, slope: float) -> Array:
    return np.where(np.asarray(x) > 0, x, slope * np.asarray(x))


def graph_attention(
    features: ArrayLike,
    edge_index: ArrayLike,
    *,
    source_vector: ArrayLike,
    target_vector: ArrayLike,
    negative_slope: float = 0.2,
    self_loops: bool = False,
) -> Array:
    """Compute softmax over the incoming edges of LeakyReLU(bᵀxᵢ + aᵀxⱼ), times the sources' features.

    Args:
        features: (N, H, C), projected.
        edge_index: (2, M): sources, targets.
        source_vector: (H, C), a.
        target_vector: (H, C), b.
        negative_slope: of LeakyReLU.
        self_loops: one edge from every node to itself, instead of those in the list.
    Returns:
        (N, H, C) float64.
    """
    x, a, b = (np.asarray(z, dtype=np.float64) for z in (features, source_vector, target_vector))

    def score(h: int, j: int, i: int) -> float:
        return float(_leaky_relu(b[h] @ x[i, h] + a[h] @ x[j, h], negative_slope))

    return _attend(x, edge_index, self_loops, score)


def graph_attention_v2(
    features: ArrayLike,
    edge_index: ArrayLike,
    *,
    vector: ArrayLike,
    target_features: ArrayLike | None = None,
    negative_slope: float = 0.2,
    self_loops: bool = False,
) -> Array:
    """Compute softmax over the incoming edges of aᵀ LeakyReLU(yᵢ + xⱼ), times the sources' features.

    Args:
        features: (N, H, C), x, projected.
        edge_index: (2, M): sources, targets.
        vector: (H, C), a.
        target_features: (N, H, C), y; x by default.
        negative_slope: of LeakyReLU.
        self_loops: one edge from every node to itself, instead of those in the list.
    Returns:
        (N, H, C) float64.
    """
    x, a = (np.asarray(z, dtype=np.float64) for z in (features, vector))
    y = x if target_features is None else np.asarray(target_features, dtype=np.float64)

    def score(h: int, j: int, i: int) -> float:
        return float(a[h] @ _leaky_relu(y[i, h] + x[j, h], negative_slope))

    return _attend(x, edge_index, self_loops, score)
