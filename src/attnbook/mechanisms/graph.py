"""Graph attention: each node attends to the sources of its incoming edges."""

from __future__ import annotations

import math
import warnings
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.mechanisms.common import working_type
from attnbook.shapes import check_no_nan, check_tensor, describe, describe_dtype, mismatch, values_are_readable

# Here N counts nodes, M edges, H heads and C the features of a head. H heads on one graph are one head on H copies of
# the graph side by side: features (H·N, C), edges H·M. Edges are sorted by their target, so that those of one node
# stand together: the weights are then a sparse (H·N, H·N) matrix, rows by target, in CSR form.


@cache
def _silence() -> None:
    """Make a sparse matrix, so that PyTorch's warning that these are new, which comes once, is behind us."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)


def _matrix(first: Tensor, columns: Tensor, entries: Tensor) -> Tensor:
    """Make a sparse square matrix in CSR form."""
    _silence()
    return torch.sparse_csr_tensor(first, columns, entries, (len(first) - 1,) * 2, check_invariants=False)


def _first_of(index: Tensor, nodes: int) -> Tensor:
    """Return where each node's edges begin in a sorted list, and where the last one's end: (nodes + 1,)."""
    first = index.new_zeros(nodes + 1)  # of the index's type, as sparse matrices want it
    torch.cumsum(torch.bincount(index, minlength=nodes), 0, out=first[1:])
    return first


class _Attend(torch.autograd.Function):
    """Softmax over each node's incoming edges, and the weighted sum of their sources' features.

    No tensor has an edge axis and a feature axis: sums over edges are products with sparse matrices, and the gradient
    of the weights, a product of two dense matrices wanted at the edges alone, is computed there alone.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, features: Tensor, source: Tensor, target: Tensor, first: Tensor) -> Tensor:
        top = torch.segment_reduce(scores, "max", offsets=first)  # −∞ at nodes without edges
        weights = (scores - top.index_select(0, target)).exp_()
        weights /= torch.segment_reduce(weights, "sum", offsets=first).index_select(0, target)
        ctx.save_for_backward(weights, features, source, target, first)
        return _matrix(first, source, weights) @ features

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weights, features, source, target, first = ctx.saved_tensors
        source_sorted, order = source.sort(stable=True)
        transposed = _matrix(_first_of(source_sorted, len(features)), target[order], weights[order])
        at_edges = _matrix(first, source, torch.zeros_like(weights))
        grad_weights = torch.sparse.sampled_addmm(at_edges, grad, features.T, beta=0).values()  # of G Xᵀ
        weighted = weights * grad_weights
        mean = torch.segment_reduce(weighted, "sum", offsets=first).index_select(0, target)
        return weighted.sub_(weights * mean), transposed @ grad, None, None, None


def _side_by_side(x: Tensor) -> Tensor:
    """(N, H, C) → (H·N, C), in the working type."""
    return x.to(working_type(x)).transpose(0, 1).reshape(-1, x.shape[2])


def _apart(x: Tensor, features: Tensor) -> Tensor:
    """(H·N, C) → (N, H, C), in the type of the features."""
    return x.view(features.shape[1], len(features), -1).transpose(0, 1).contiguous().to(features.dtype)


def _check_features(features: Tensor) -> Tensor:
    check_no_nan("features", check_tensor("features", features, "N H C"))
    return features


def _check_vector(name: str, vector: Tensor, features: Tensor) -> Tensor:
    """Check a vector for each head, and bring it into the working type."""
    check_tensor(name, vector, "H C")
    if vector.shape != features.shape[1:]:
        raise mismatch(name, f"(H, C) = {tuple(features.shape[1:])}, those of features", vector)
    if vector.dtype != features.dtype:
        raise mismatch(name, f"{describe_dtype(features)}, the type of features", describe_dtype(vector))
    return check_no_nan(name, vector).to(working_type(features))


def _check_slope(negative_slope: float) -> float:
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise mismatch("negative_slope", "a finite number", describe(negative_slope))
    if not math.isfinite(negative_slope):
        raise mismatch("negative_slope", "a finite number", describe(negative_slope))
    return float(negative_slope)


def _sorted_edges(edge_index: Tensor, features: Tensor, self_loops: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Check the edges, copy the graph for each head, and sort by target.

    Returns sources and targets (H·M,), and where each node's edges begin and the last one's end (H·N + 1,).
    """
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int64, torch.int32):
        raise mismatch("edge_index", "an int64 or int32 tensor (2, edges)", describe(edge_index))
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise mismatch("edge_index", "a tensor (2, edges): sources, targets", edge_index)
    nodes = len(features)
    if edge_index.numel() and values_are_readable(edge_index):
        low, high = (end.item() for end in edge_index.aminmax())
        if low < 0 or high >= nodes:
            raise mismatch("edge_index", f"nodes in [0, {nodes - 1}]", f"{low if low < 0 else high}")
    if self_loops:
        every = torch.arange(nodes, device=edge_index.device, dtype=edge_index.dtype).expand(2, -1)
        edge_index = torch.cat([edge_index[:, edge_index[0] != edge_index[1]], every], 1)
    heads, edges = features.shape[1], edge_index.shape[1]
    pairs = edge_index[1].long() * nodes + edge_index[0]  # one number an edge: sorted by target, then by source
    # NumPy sorts several times as fast as PyTorch, where it can reach the values.
    pairs = torch.from_numpy(np.sort(pairs.numpy())) if values_are_readable(pairs) else pairs.sort().values
    target = pairs.div(nodes, rounding_mode="trunc")
    source = pairs.sub_(target * nodes)
    if max(nodes, edges) * heads < 2**31:  # half the memory, and what the kernels of sparse products want
        source, target = source.int(), target.int()
    first = _first_of(target, nodes)
    of_head = torch.arange(heads, device=target.device, dtype=target.dtype)[:, None]
    source, target = (ends + of_head * nodes for ends in (source, target))
    first = torch.cat([(first[:-1] + of_head * edges).view(-1), first[-1:] * heads])
    return source.view(-1), target.view(-1), first


def graph_attention(
    features: Tensor,
    edge_index: Tensor,
    *,
    source_vector: Tensor,
    target_vector: Tensor,
    negative_slope: float = 0.2,
    self_loops: bool = False,
) -> Tensor:
    """Give each node a mean of its neighbours, weighted by a score of both ends (GAT).

    With W x projected features, an edge j → i scores eᵢⱼ = LeakyReLU(bᵀW xᵢ + aᵀW xⱼ), softmax runs over the incoming
    edges of i, and the output is Σⱼ αᵢⱼ W xⱼ ({cite}`velickovic2018`, eqs. 3 and 4). An edge that is listed twice
    counts twice. Which neighbour scores highest is the same for every node (:func:`graph_attention_v2`).

    Args:
        features: (N, H, C) float, already projected: ``(x @ weight).view(N, H, C)``.
        edge_index: (2, M) integers: sources, targets; in any order.
        source_vector: (H, C), the paper's a for the neighbour j.
        target_vector: (H, C), the paper's a for the node i itself.
        negative_slope: of LeakyReLU.
        self_loops: let every node attend to itself too, once, as the paper does.
    Returns:
        (N, H, C), dtype of features; 0 at a node that no edge enters. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, a node outside [0, N − 1], NaN.
    Cost: O((N + M)HC) time and O((N + M)H + NHC) memory: features are never copied to the edges.
    Differs from the paper: no dropout, no activation at the end, and the caller projects.
    """
    _check_features(features)
    a = _check_vector("source_vector", source_vector, features)
    b = _check_vector("target_vector", target_vector, features)
    slope = _check_slope(negative_slope)
    source, target, first = _sorted_edges(edge_index, features, self_loops)
    x = _side_by_side(features)
    both = torch.block_diag(*torch.stack([a, b], 1)).T  # (H·C, 2·H): the two vectors of each head, in its rows
    of_nodes = (features.to(x.dtype).flatten(1) @ both).unflatten(1, (-1, 2))  # (N, H, 2)
    of_source, of_target = of_nodes.permute(2, 1, 0).flatten(1)  # (H·N,) each
    ends = of_source.index_select(0, source) + of_target.index_select(0, target)  # (H·M,)
    return _apart(_Attend.apply(torch.nn.functional.leaky_relu(ends, slope), x, source, target, first), features)


def graph_attention_v2(
    features: Tensor,
    edge_index: Tensor,
    *,
    vector: Tensor,
    target_features: Tensor | None = None,
    negative_slope: float = 0.2,
    self_loops: bool = False,
) -> Tensor:
    """Do what :func:`graph_attention` does with scores in which each node may prefer another neighbour (GATv2).

    An edge j → i scores eᵢⱼ = aᵀ LeakyReLU(V xᵢ + W xⱼ), the vector a after the nonlinearity; the output is Σⱼ αᵢⱼ W xⱼ
    ({cite}`brody2022`).

    Args:
        features: (N, H, C) float, the projection W x of the sources, which is also what is averaged.
        edge_index: (2, M) integers: sources, targets; in any order.
        vector: (H, C), the paper's a.
        target_features: (N, H, C), the projection V x of the targets; ``features`` by default.
        negative_slope: of LeakyReLU.
        self_loops: let every node attend to itself too, once.
    Returns:
        (N, H, C), dtype of features; 0 at a node that no edge enters. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, a node outside [0, N − 1], NaN.
    Cost: O((N + M)HC) time and O((N + M)HC) memory: the nonlinearity wants both ends' features at every edge.
    Differs from the paper: no dropout, no activation at the end, and the caller projects.
    """
    _check_features(features)
    a = _check_vector("vector", vector, features)
    slope = _check_slope(negative_slope)
    if target_features is None:
        target_features = features
    elif not isinstance(target_features, Tensor) or (
        (target_features.shape, target_features.dtype) != (features.shape, features.dtype)
    ):
        raise mismatch("target_features", f"a {describe(features)}, as features", describe(target_features))
    check_no_nan("target_features", target_features)
    source, target, first = _sorted_edges(edge_index, features, self_loops)
    x = _side_by_side(features)
    ends = x.index_select(0, source) + _side_by_side(target_features).index_select(0, target)  # (H·M, C)
    ends = torch.nn.functional.leaky_relu(ends, slope).view(len(a), -1, a.shape[1])
    scores = (ends @ a[:, :, None]).view(-1)  # (H·M,)
    return _apart(_Attend.apply(scores, x, source, target, first), features)
