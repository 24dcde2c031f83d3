"""Graph attention beside PyTorch Geometric's layer, with equal weights, the projection included in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnbook.bench.case import Comparison
from attnbook.mechanisms import graph_attention

# nodes, edges, features, heads, size of a head, self-loops, with the backward pass, goal
_CASES = (
    ("as large as Cora", 2708, 10556, 1433, 8, 8, True, False, 0.75),
    ("drawn at random", 20_000, 200_000, 128, 4, 32, False, True, 0.33),
)


def suite() -> Iterator[Comparison]:
    """Yield the comparisons with ``GATConv`` on random graphs; both get the bare list of edges at each call.

    Raises:
        ImportError: the package ``torch_geometric`` is not installed.
    """
    from torch_geometric.nn import GATConv

    for name, nodes, edges, features, heads, size, self_loops, backward, goal in _CASES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(nodes, features, generator=generator).requires_grad_(backward)
        edge_index = torch.randint(nodes, (2, edges), generator=generator)
        layer = GATConv(features, size, heads=heads, add_self_loops=self_loops).requires_grad_(backward)

        def ours(x: Tensor, edge_index: Tensor, layer: GATConv = layer, self_loops: bool = self_loops) -> Tensor:
            output = graph_attention(
                layer.lin(x).view(len(x), layer.heads, -1),
                edge_index,
                source_vector=layer.att_src[0],
                target_vector=layer.att_dst[0],
                self_loops=self_loops,
            )
            return output.flatten(1) + layer.bias

        def call(
            form: Callable[[Tensor, Tensor], Tensor],
            x: Tensor = x,
            edge_index: Tensor = edge_index,
            layer: GATConv = layer,
        ) -> Callable[[], Tensor]:
            def once() -> Tensor:
                output = form(x, edge_index)
                if not output.requires_grad:
                    return output
                return torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])[0]

            return once

        yield Comparison(
            suite="graph",
            what="graph attention, forward" + (" and backward" if backward else ""),
            setting=f"{nodes} nodes, {edges} edges ({name}), F = {features}, H = {heads}, C = {size}, float32",
            ours=call(ours),
            peers={"PyG GATConv": call(layer)},
            goal=goal,
        )
