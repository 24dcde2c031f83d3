"""Graph attention: against the specification, PyTorch Geometric and dense attention; what v2 can and v1 cannot."""

from __future__ import annotations

import warnings

import pytest
import torch

import attnbook
from attnbook import measure, reference
from attnbook.mechanisms import graph_attention, graph_attention_v2
from helpers import array, assert_close, complains

N, H, C = 9, 2, 3


def graph(nodes: int = N, edges: int = 30) -> torch.Tensor:
    """Draw edges, some of them twice and some from a node to itself; none enters node 0."""
    drawn = torch.randint(0, nodes, (2, edges))
    drawn[1].clamp_(min=1)
    return torch.cat([drawn, drawn[:, :3], torch.tensor([[3, 4], [3, 4]])], 1)


def given(nodes: int = N, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return {"features": normal(nodes, H, C), "source_vector": normal(H, C), "target_vector": normal(H, C)}


def given_v2(nodes: int = N, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    first = given(nodes, dtype)
    return {
        "features": first["features"],
        "target_features": (first["features"].detach() + 1).requires_grad_(),
        "vector": first["source_vector"],
    }


FORMS = ((graph_attention, given), (graph_attention_v2, given_v2))


@pytest.mark.parametrize(("function", "make"), FORMS)
@pytest.mark.parametrize("self_loops", [False, True])
def test_equals_the_specification_in_any_order_of_edges(function, make, self_loops):
    inputs, edges = make(), graph()
    expected = getattr(reference, function.__name__)(
        **{name: array(x) for name, x in inputs.items()}, edge_index=edges, self_loops=self_loops
    )
    for order in (torch.arange(edges.shape[1]), torch.randperm(edges.shape[1]), edges[1].argsort()):
        for kind in (torch.int64, torch.int32):
            found = function(edge_index=edges[:, order].to(kind), self_loops=self_loops, **inputs)
            assert_close(found, expected)
    if not self_loops:
        assert (found[0] == 0).all()


@pytest.mark.parametrize(("function", "make"), FORMS)
def test_gradcheck(function, make):
    inputs, edges = make(), graph()
    names = list(inputs)

    def call(*tensors):
        return function(edge_index=edges, negative_slope=0.3, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize(("function", "make"), FORMS)
def test_a_graph_without_edges_gives_zeros(function, make):
    inputs = make()
    output = function(edge_index=torch.zeros(2, 0, dtype=torch.int64), **inputs)
    assert (output == 0).all()
    for gradient in torch.autograd.grad(output.sum(), list(inputs.values())):
        assert (gradient == 0).all()


@pytest.mark.parametrize(("function", "make"), FORMS)
def test_large_scores_neither_overflow_nor_vanish(function, make):
    inputs = {name: (x * 1e3).detach() for name, x in make().items()}
    expected = getattr(reference, function.__name__)(
        **{name: array(x) for name, x in inputs.items()}, edge_index=(edges := graph())
    )
    assert_close(function(edge_index=edges, **inputs), expected)


def test_on_a_complete_graph_it_is_dense_attention_with_a_bias():
    inputs = given()
    every = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    x, a, b = inputs.values()
    ends = torch.einsum("nhc,hc->hn", x, b)[:, :, None] + torch.einsum("nhc,hc->hn", x, a)[:, None]  # (H, N, N)
    nothing, value = torch.zeros(1, H, N, 1, dtype=x.dtype), x.transpose(0, 1)[None]
    bias = torch.nn.functional.leaky_relu(ends, 0.2)
    dense = attnbook.attention(nothing, nothing, value, bias=bias, backend="reference")
    assert_close(graph_attention(edge_index=every, **inputs), dense[0].transpose(0, 1))


@pytest.fixture
def geometric():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")


@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_equals_torch_geometric_with_the_same_weights(geometric, version, self_loops):
    x = torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
    edges = graph()
    if version == 1:
        layer = geometric.GATConv(5, C, heads=H, add_self_loops=self_loops).double()
        ours = graph_attention(
            layer.lin(x).view(N, H, C),
            edges,
            source_vector=layer.att_src[0],
            target_vector=layer.att_dst[0],
            self_loops=self_loops,
        )
    else:
        layer = geometric.GATv2Conv(5, C, heads=H, add_self_loops=self_loops).double()
        ours = graph_attention_v2(
            layer.lin_l(x).view(N, H, C),
            edges,
            target_features=layer.lin_r(x).view(N, H, C),
            vector=layer.att[0],
            self_loops=self_loops,
        )
    theirs = layer(x, edges).view(N, H, C) - layer.bias.view(H, C)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    direction = torch.randn_like(ours)
    weights = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    gradients = [torch.autograd.grad(y, [x, *weights], direction, retain_graph=True) for y in (ours, theirs)]
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-11)


def test_every_node_of_v1_prefers_the_same_neighbour_and_of_v2_need_not():
    """{cite}`brody2022`: with all pairs as edges, v1's ranking of sources is that of aᵀxⱼ alone."""
    every = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    indicator = torch.eye(N, dtype=torch.float64)[:, None]  # one head; the output is the row of weights
    a, b = torch.randn(2, 1, N, dtype=torch.float64)
    weights = graph_attention(indicator, every, source_vector=a, target_vector=b)[:, 0]
    assert (weights.argmax(1) == a[0].argmax()).all()
    # A lookup: leaky(yᵢ + xⱼ) with yᵢ = −eᵢ is lowest at j = i in the i-th feature, and a = −1 turns that around.
    lookup = graph_attention_v2(
        8 * indicator, every, target_features=-8 * indicator, vector=torch.full((1, N), -8.0, dtype=torch.float64)
    )[:, 0]
    assert (lookup.argmax(1) == torch.arange(N)).all()


def test_no_feature_is_copied_to_the_edges():
    x, a = torch.randn(200, 2, 64), torch.randn(2, 64)

    def peak(edges: int) -> int:
        index = torch.randint(0, 200, (2, edges))
        return measure.peak_memory(lambda: graph_attention(x, index, source_vector=a, target_vector=a))

    few, many = peak(2_000), peak(22_000)
    assert (many - few) / 20_000 < 2 * 64 * 4  # bytes an edge: less than one copy of its source's features


X, A = torch.zeros(4, 2, 3), torch.zeros(2, 3)
EDGES = torch.tensor([[0, 1], [1, 3]])
BAD = {
    "edge_index: expected nodes in [0, 3], got 4": {"edge_index": torch.tensor([[0], [4]])},
    "edge_index: expected nodes in [0, 3], got -1": {"edge_index": torch.tensor([[-1], [2]])},
    "edge_index: expected a tensor (2, edges): sources, targets, got int64 tensor of shape (5, 2)": {
        "edge_index": torch.zeros(5, 2, dtype=torch.int64)
    },
    "edge_index: expected an int64 or int32 tensor (2, edges), got float32 tensor of shape (2, 5)": {
        "edge_index": torch.zeros(2, 5)
    },
    "features: expected a tensor (N, H, C), got float32 tensor of shape (4, 6)": {"features": torch.zeros(4, 6)},
    "features: expected no NaN, got 24 NaN of 24 elements": {"features": X * float("nan")},
    "negative_slope: expected a finite number, got nan": {"negative_slope": float("nan")},
    "negative_slope: expected a finite number, got '1'": {"negative_slope": "1"},
}
BAD_VECTORS = {
    "expected (H, C) = (2, 3), those of features, got float32 tensor of shape (3, 2)": torch.zeros(3, 2),
    "expected float32, the type of features, got float64": torch.zeros(2, 3, dtype=torch.float64),
    "expected no NaN, got 6 NaN of 6 elements": torch.full((2, 3), float("nan")),
}
GOOD = {
    graph_attention: {"features": X, "edge_index": EDGES, "source_vector": A, "target_vector": A},
    graph_attention_v2: {"features": X, "edge_index": EDGES, "vector": A},
}


@pytest.mark.parametrize("function", GOOD)
@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(function, text, arguments):
    with complains(text):
        function(**{**GOOD[function], **arguments})


@pytest.mark.parametrize(
    ("function", "name"),
    [(graph_attention, "source_vector"), (graph_attention, "target_vector"), (graph_attention_v2, "vector")],
)
@pytest.mark.parametrize(("text", "vector"), BAD_VECTORS.items(), ids=range(len(BAD_VECTORS)))
def test_bad_vectors_are_named(function, name, text, vector):
    with complains(f"{name}: {text}"):
        function(**{**GOOD[function], name: vector})


def test_bad_target_features_are_named():
    with complains(
        "target_features: expected a float32 tensor of shape (4, 2, 3), as features, got float32 tensor of shape (4, 2)"
    ):
        graph_attention_v2(**GOOD[graph_attention_v2], target_features=torch.zeros(4, 2))
