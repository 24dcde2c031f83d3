"""Networks over graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from attnbook.models import GAT, GATConfig, GraphTransformer, GraphTransformerConfig
from attnbook.models.graph import laplacian_positions, neighbour_mask
from helpers import complains, tokens

NODES = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
PATH = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])  # a chain of seven, each seen by the next
BOTH_WAYS = torch.cat([PATH, PATH.flip(0)], 1)
CONFIGS = {
    "gat": GATConfig(5, 3, width=4, num_heads=2, dropout=0.0),
    "gatv2": GATConfig(5, 3, width=4, num_heads=2, dropout=0.0, version=2, output_heads=2),
    "transformer": GraphTransformerConfig(5, 3, width=16, depth=2, num_heads=2, positions=2),
    "transformer without positions": GraphTransformerConfig(5, 3, width=16, depth=2, num_heads=2, positions=0),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def make(name):
    return (GAT if name.startswith("gat") else GraphTransformer)(CONFIGS[name])


@EACH
def test_the_formula_counts_the_parameters(name):
    for config in (CONFIGS[name], replace(CONFIGS[name], depth=1), replace(CONFIGS[name], depth=3, width=8)):
        model = (GAT if isinstance(config, GATConfig) else GraphTransformer)(config)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


def test_the_papers_network_for_cora():
    # 1,433 words, 7 subjects, 8 heads of 8: (1433 · 64 + 3 · 64) + (64 · 7 + 3 · 7).
    assert GATConfig(1433, 7).num_parameters() == 92_373


@EACH
def test_shapes_and_gradients(name):
    model = make(name)
    output = model(NODES, BOTH_WAYS)
    assert output.shape == (7, 3)
    output.square().sum().backward()
    for part, parameter in model.named_parameters():
        if not part.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, part


@EACH
def test_a_node_sees_as_far_against_the_edges_as_there_are_layers(name):
    model = make(name).double()
    nodes = NODES.double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(nodes, PATH)[4].square().sum(), nodes)
    assert torch.equal(gradient.abs().sum(1) > 0, torch.tensor([0, 0, 1, 1, 1, 0, 0], dtype=torch.bool))


@pytest.mark.parametrize("name", ["gat", "gatv2", "transformer without positions"])
def test_renumbering_the_nodes_renumbers_the_output(name):
    model, order = make(name).double(), torch.tensor([3, 6, 1, 0, 5, 2, 4])
    place = order.argsort()  # where each node went
    shuffled = model(NODES.double()[order], place[BOTH_WAYS])
    torch.testing.assert_close(shuffled, model(NODES.double(), BOTH_WAYS)[order])


def test_version_two_lets_nodes_prefer_different_neighbours():
    # Every node sees all. With as many features as nodes the weights can be solved for from what was averaged.
    nodes = torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = torch.cartesian_prod(torch.arange(7), torch.arange(7)).T
    for version, alike in ((1, True), (2, False)):
        model = GAT(GATConfig(7, 7, depth=1, version=version, dropout=0.0)).double()
        with torch.no_grad():
            weights = torch.linalg.solve(model.layers[0].project(nodes), model(nodes, edges), left=False)
        torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64))
        ranking = weights.argsort(1)  # (target, source)
        assert (ranking == ranking[0]).all() == alike


def test_masks_are_rows_of_targets():
    mask = neighbour_mask(torch.tensor([[0, 2], [1, 1]]), 3)
    assert mask.int().tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 1]]


def test_positions_are_the_smoothest_functions():
    # On a ring of n, the eigenvalues are 1 − cos(2πk/n).
    n = 8
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    positions = laplacian_positions(ring, n, 2).double()
    torch.testing.assert_close(positions.T @ positions, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    smoothed = (positions.roll(1, 0) + positions.roll(-1, 0)) / 2
    torch.testing.assert_close(smoothed, positions * torch.cos(torch.tensor(2 * torch.pi / n)), atol=1e-6, rtol=0)
    assert laplacian_positions(ring[:, :1], 2, 5).shape == (2, 5)  # fewer nodes than positions


def test_signs_of_positions_are_drawn_in_training_alone():
    model = make("transformer")
    model.eval()
    assert torch.equal(model(NODES, BOTH_WAYS), model(NODES, BOTH_WAYS))
    model.train()
    assert len({model(NODES, BOTH_WAYS).sum().item() for _ in range(20)}) == 4


@EACH
def test_one_graph_can_be_learned_by_heart(name):
    model = GAT(replace(CONFIGS[name], width=8, num_heads=4)) if name.startswith("gat") else make(name)
    classes = tokens(7, high=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(NODES, BOTH_WAYS), classes)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


MODEL, TRANSFORMER = make("gat"), make("transformer")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GATConfig(5, 3, version=3), "version: expected 1 or 2, got 3"),
        (lambda: GATConfig(5, 3, dropout=1.0), "dropout: expected a number in [0, 1), got 1.0"),
        (lambda: GraphTransformerConfig(5, 3, 16, 0, 2), "depth: expected an integer ≥ 1, got 0"),
        (lambda: MODEL(NODES[:, :4], PATH), "nodes: expected last axis 5, got shape (7, 4)"),
        (lambda: MODEL(NODES, PATH + 1), "edge_index: expected nodes in [0, 6], got 7"),
        (lambda: TRANSFORMER(NODES, PATH + 1), "edge_index: expected nodes in [0, 6], got 1 to 7"),
        (
            lambda: TRANSFORMER(NODES, PATH.float()),
            "edge_index: expected an int64 or int32 tensor (2, edges), got float32…",
        ),
        (lambda: TRANSFORMER(NODES, PATH[0]), "edge_index: expected a tensor (2, edges): sources, targets, got int64…"),
        (lambda: TRANSFORMER(NODES, PATH, torch.zeros(7, 3)), "positions: expected shape (7, 2), got shape (7, 3)"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
