"""Networks over graphs: graph attention, its second version, and a Transformer among neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.layers import TransformerBlock, make_norm
from attnbook.mechanisms import graph_attention, graph_attention_v2
from attnbook.models.count import block, linear
from attnbook.shapes import check_count, check_probability, check_tensor, describe, mismatch, tensor_shape


@dataclass(frozen=True)
class GATConfig:
    """The shape of a :class:`GAT`. The defaults are those of its paper for Cora.

    Attributes:
        features: numbers that describe a node.
        outputs: numbers to give for a node, its classes' scores say.
        width: C, features of a head.
        num_heads: H, of all layers but the last.
        depth: number of layers.
        output_heads: heads of the last layer, whose outputs are averaged.
        version: 1 ({cite}`velickovic2018`) or 2 ({cite}`brody2022`).
        dropout: of each layer's input, in training.
    """

    features: int
    outputs: int
    width: int = 8
    num_heads: int = 8
    depth: int = 2
    output_heads: int = 1
    version: int = 1
    dropout: float = 0.6

    def __post_init__(self) -> None:
        for name in ("features", "outputs", "width", "num_heads", "depth", "output_heads"):
            check_count(name, getattr(self, name))
        if self.version not in (1, 2):
            raise mismatch("version", "1 or 2", self.version)
        check_probability("dropout", self.dropout)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Return each layer's input, heads and features of a head."""
        joined = self.num_heads * self.width
        inner = [(joined if i else self.features, self.num_heads, self.width) for i in range(self.depth - 1)]
        return [*inner, (joined if self.depth > 1 else self.features, self.output_heads, self.outputs)]

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        count = 0
        for i, (inputs, heads, width) in enumerate(self.sizes()):
            # Version 1 has one projection and two vectors, version 2 two projections and one vector.
            count += self.version * inputs * heads * width + (3 - self.version) * heads * width
            count += width if i == self.depth - 1 else heads * width
        return count


class GraphAttentionLayer(nn.Module):
    """Project the nodes, let each attend to its neighbours and itself, and join the heads.

    Args:
        inputs: width of what it takes.
        num_heads: H.
        width: C, features of a head.
        version: 1 or 2.
        average: average the heads rather than lay them side by side.
    """

    def __init__(self, inputs: int, num_heads: int, width: int, *, version: int = 1, average: bool = False):
        super().__init__()
        self.num_heads, self.version, self.average = num_heads, version, average
        self.project = nn.Linear(inputs, num_heads * width, bias=False)
        self.project_target = nn.Linear(inputs, num_heads * width, bias=False) if version == 2 else None
        self.vectors = nn.ParameterList(torch.empty(num_heads, width) for _ in range(3 - version))
        self.bias = nn.Parameter(torch.zeros(width if average else num_heads * width))
        for matrix in self.parameters():
            if matrix.dim() == 2:
                nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Map nodes (N, inputs) and edges (2, M), sources over targets, to (N, C) or (N, H·C)."""
        features = self.project(x).unflatten(-1, (self.num_heads, -1))  # (N, H, C)
        if self.version == 1:
            source, target = self.vectors
            mixed = graph_attention(features, edge_index, source_vector=source, target_vector=target, self_loops=True)
        else:
            own = self.project_target(x).unflatten(-1, (self.num_heads, -1))
            mixed = graph_attention_v2(
                features, edge_index, vector=self.vectors[0], target_features=own, self_loops=True
            )
        return (mixed.mean(1) if self.average else mixed.flatten(1)) + self.bias


class GAT(nn.Module):
    """Describe each node by what its neighbours are, as far away as there are layers.

    A graph attention network ({cite}`velickovic2018`), or with ``version=2`` one whose nodes may each prefer other
    neighbours ({cite}`brody2022`): heads side by side and ELU between the layers, averaged heads in the last. Differs
    from the papers: the weights of attention are not dropped out, only what enters a layer.

    Args:
        config: its shape.
    """

    def __init__(self, config: GATConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            GraphAttentionLayer(*size, version=config.version, average=i == config.depth - 1)
            for i, size in enumerate(config.sizes())
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, nodes: Tensor, edge_index: Tensor) -> Tensor:
        """Describe the nodes.

        Args:
            nodes: (N, features).
            edge_index: (2, M) integers: sources, targets. An undirected edge is listed both ways; every node sees
                itself besides.
        Returns:
            (N, outputs).
        Raises:
            ValueError: shapes that do not match, a node that does not exist.
        """
        x = check_nodes(nodes, self.config.features)
        for i, layer in enumerate(self.layers):
            x = layer(self.dropout(nn.functional.elu(x) if i else x), edge_index)
        return x


@dataclass(frozen=True)
class GraphTransformerConfig:
    """The shape of a :class:`GraphTransformer`.

    Attributes:
        features: numbers that describe a node.
        outputs: numbers to give for a node.
        width: E.
        depth: number of blocks.
        num_heads: H.
        positions: eigenvectors of the graph's Laplacian that tell where a node is; 0 for none.
        hidden: width of the feed-forward networks; 2E by default, as in its paper.
        dropout: of the weights and what each part adds.
    """

    features: int
    outputs: int
    width: int
    depth: int
    num_heads: int
    positions: int = 8
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("features", "outputs", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        check_count("positions", self.positions, least=0)
        check_probability("dropout", self.dropout)

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E = self.width
        ends = linear(self.features, E) + linear(E, self.outputs) + (linear(self.positions, E) if self.positions else 0)
        return ends + self.depth * block(E, self.hidden or 2 * E) + 2 * E


def check_nodes(nodes: Tensor, features: int) -> Tensor:
    """Check nodes' features.

    Args:
        nodes: what the caller passed.
        features: numbers that should describe a node.
    Returns:
        The tensor, unchanged.
    Raises:
        ValueError: another rank or width.
    """
    if check_tensor("nodes", nodes, "N features").shape[1] != features:
        raise mismatch("nodes", f"last axis {features}", tensor_shape(nodes))
    return nodes


def neighbour_mask(edge_index: Tensor, nodes: int) -> Tensor:
    """Let each node see itself and the sources of its incoming edges.

    Args:
        edge_index: (2, M) integers: sources, targets.
        nodes: N.
    Returns:
        (N, N), bool, rows by target; True = may attend.
    Raises:
        ValueError: another shape or type, a node that does not exist.
    """
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int64, torch.int32):
        raise mismatch("edge_index", "an int64 or int32 tensor (2, edges)", describe(edge_index))
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise mismatch("edge_index", "a tensor (2, edges): sources, targets", edge_index)
    if edge_index.numel() and not 0 <= edge_index.min() <= edge_index.max() < nodes:
        raise mismatch("edge_index", f"nodes in [0, {nodes - 1}]", f"{edge_index.min()} to {edge_index.max()}")
    mask = torch.eye(nodes, dtype=torch.bool, device=edge_index.device)
    mask[edge_index[1].long(), edge_index[0].long()] = True
    return mask


def laplacian_positions(edge_index: Tensor, nodes: int, count: int) -> Tensor:
    """Tell where nodes are by the smoothest functions on their graph: eigenvectors of I − D^−½ A D^−½.

    Those of the smallest eigenvalues, after the first ({cite}`dwivedi2021`); each one's sign is arbitrary.
    Directions of edges are forgotten.

    Args:
        edge_index: (2, M) integers: sources, targets.
        nodes: N.
        count: how many; zeros fill up where the graph has fewer.
    Returns:
        (N, count), float.
    Raises:
        ValueError: as for :func:`neighbour_mask`.
    Cost: O(N³) time, O(N²) memory.
    """
    joined = neighbour_mask(edge_index, nodes).fill_diagonal_(False)
    joined = (joined | joined.T).double()
    scale = joined.sum(1).clamp(min=1).rsqrt()
    laplacian = torch.eye(nodes, dtype=torch.float64, device=joined.device) - scale[:, None] * joined * scale
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, 1 : count + 1]
    return nn.functional.pad(vectors, (0, count - vectors.shape[1])).float()


class GraphTransformer(nn.Module):
    """Let nodes attend to their neighbours by scaled dot products, as a Transformer's tokens do ({cite}`dwivedi2021`).

    Differs from the paper: layer norms before the parts, where it has batch norms after them; no features of edges; and
    the scores of all pairs are computed and masked, so that memory is O(N²) where the edges alone would do.

    Args:
        config: its shape.
    """

    def __init__(self, config: GraphTransformerConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.embedding = nn.Linear(config.features, E)
        self.position = nn.Linear(config.positions, E) if config.positions else None
        self.blocks = nn.ModuleList(
            TransformerBlock(E, config.num_heads, hidden=config.hidden or 2 * E, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E)
        self.output = nn.Linear(E, config.outputs)

    def forward(self, nodes: Tensor, edge_index: Tensor, positions: Tensor | None = None) -> Tensor:
        """Describe the nodes.

        Args:
            nodes: (N, features).
            edge_index: (2, M) integers: sources, targets.
            positions: (N, positions), from :func:`laplacian_positions`, which is called where they are not given. In
                training their signs are drawn anew each time.
        Returns:
            (N, outputs).
        Raises:
            ValueError: shapes that do not match, a node that does not exist.
        """
        x = self.embedding(check_nodes(nodes, self.config.features))
        mask = neighbour_mask(edge_index, len(nodes))
        if self.position is not None:
            if positions is None:
                positions = laplacian_positions(edge_index, len(nodes), self.config.positions).to(nodes)
            wanted = (len(nodes), self.config.positions)
            if check_tensor("positions", positions, "N positions").shape != wanted:
                raise mismatch("positions", f"shape {wanted}", tensor_shape(positions))
            if self.training:
                positions = positions * torch.randn(wanted[1]).sign().to(positions)
            x = x + self.position(positions)
        x = x[None]  # the nodes are the tokens of one sequence
        for layer in self.blocks:
            x = layer(x, attn_mask=mask)
        return self.output(self.norm(x))[0]
