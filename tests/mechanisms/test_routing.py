"""Routing attention: clusters of equal size, centroids that find planted directions, and no matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnbook import reference
from attnbook.mechanisms import routing_attention, tiled_attention
from attnbook.mechanisms.routing import draw_centroids, update_centroids
from helpers import array, assert_close, complains


def inputs(n: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 2):
    sizes = ((heads, n, 6), (kv_heads, n, 6), (kv_heads, n, 3))
    return tuple(torch.randn(batch, h, n, d, dtype=torch.float64).requires_grad_() for h, n, d in sizes)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("clusters", [1, 3])
def test_clusters_of_everything_are_exact(is_causal, clusters, generator):
    q, k, v = inputs(17)
    found = routing_attention(q, k, v, num_clusters=clusters, window=17, is_causal=is_causal, generator=generator)
    assert_close(found, tiled_attention(q, k, v, is_causal=is_causal))


@pytest.mark.parametrize("window", [None, 1, 7, 99])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_every_window_is_specified(window, is_causal, heads, generator):
    q, k, v = inputs(22)
    centroids = torch.randn(heads, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 22, generator=generator) < 0.7
    options = {"window": window, "is_causal": is_causal}
    expected = reference.routing_attention(
        array(q), array(k), array(v), centroids=array(centroids), attn_mask=array(mask), **options
    )
    assert_close(routing_attention(q, k, v, centroids=centroids, attn_mask=mask, **options), expected)


def test_hidden_positions_act_as_if_absent(generator):
    q, k, v = inputs(20)
    centroids = draw_centroids(4, 3, 6, generator=generator).double()
    mask = torch.arange(20).view(1, 1, 1, 20) < 13
    found = routing_attention(q, k, v, centroids=centroids, window=5, attn_mask=mask)
    alone = routing_attention(*(x[:, :, :13] for x in (q, k, v)), centroids=centroids, window=5)
    assert torch.allclose(found[:, :, :13], alone, rtol=0, atol=1e-14)
    assert (found[:, :, 13:] == 0).all()


def planted(n: int, generator: torch.Generator, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw vectors around four orthogonal directions; return them, the direction of each, and the directions."""
    true = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q[:4]
    label = torch.arange(n) % 4
    x = true[label] + noise * torch.randn(n, 8, generator=generator, dtype=torch.float64)
    return x[None, None], label, true


def test_centroids_find_planted_directions(generator):
    x, _, true = planted(200, generator, 0.15)
    centroids = F.normalize(true + 0.5 * torch.randn(4, 8, generator=generator, dtype=torch.float64), dim=-1)[None]
    before = (centroids[0] * true).sum(-1)
    for _ in range(60):
        centroids = update_centroids(centroids, x, x, decay=0.9)
    after = (centroids[0] * true).sum(-1)
    assert before.min() < 0.9
    assert after.min() > 0.98
    assert torch.allclose(centroids.norm(dim=-1), torch.ones(1, 4, dtype=torch.float64))


def test_a_step_moves_towards_the_mean_of_the_members(generator):
    x, label, true = planted(40, generator, 0.05)
    moved = update_centroids(true[None], x, x * 3, decay=0.7)
    for c in range(4):
        mean = F.normalize(x[0, 0, label == c], dim=-1).mean(0)
        assert_close(moved[0, c], F.normalize(0.7 * true[c] + 0.3 * mean, dim=0))


def test_a_cluster_without_members_stays_and_hidden_positions_do_not_count(generator):
    x, label, true = planted(40, generator, 0.05)
    mask = (label != 2).view(1, 1, 1, 40)
    moved = update_centroids(true[None], x, x, decay=0.5, attn_mask=mask)
    assert torch.equal(moved[0, 2], true[2])
    assert not torch.isclose(moved[0, [0, 1, 3]], true[[0, 1, 3]]).all(-1).any()


def test_with_good_centroids_near_keys_are_found(generator):
    x, _, true = planted(64, generator, 0.1)
    q, v = 12 * x, torch.randn(1, 1, 64, 3, generator=generator, dtype=torch.float64)
    exact = tiled_attention(q, x, v)

    def error(centroids: torch.Tensor) -> float:
        found = routing_attention(q, x, v, centroids=centroids[None])
        return float((found - exact).norm())

    random = [error(draw_centroids(1, 4, 8, generator=generator)[0].double()) for _ in range(5)]
    assert error(true) < 0.3 * sorted(random)[2]


def test_work_and_memory_do_not_grow_quadratically():
    from attnbook.measure import count_flops, peak_memory

    def call(n: int):
        q = torch.randn(1, 1, n, 8)
        centroids = torch.randn(1, int(n**0.5), 8)
        return lambda: routing_attention(q, q, q, centroids=centroids)

    assert count_flops(call(4096)) < 1.1 * 8 * count_flops(call(1024))  # 4^1.5 = 8, not 16
    assert peak_memory(call(4096)) < 1.2 * 8 * peak_memory(call(1024))


def test_gradcheck(generator):
    q, k, v = inputs(6, heads=2, kv_heads=1, batch=1)
    centroids = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: routing_attention(*x, centroids=centroids, is_causal=True), (q, k, v))


X = torch.ones(1, 2, 4, 3)
BAD = {
    "num_clusters: expected an integer ≥ 1, where no centroids are given, got None": {},
    "num_clusters: expected an integer ≥ 1, got 0": {"num_clusters": 0},
    "num_clusters: expected 5, as the centroids have it, or nothing, got 4": {
        "centroids": torch.ones(2, 5, 3),
        "num_clusters": 4,
    },
    "centroids: expected (H or 1, C, D) with H = 2, D = 3, got float32 tensor of shape (3, 5, 3)": {
        "centroids": torch.ones(3, 5, 3)
    },
    "window: expected an integer ≥ 1, got 0": {"num_clusters": 2, "window": 0},
    "key: expected as many positions as query has, S = L = 4, got shape (1, 2, 3, 3)": {
        "num_clusters": 2,
        "key": X[:, :, :3],
        "value": X[:, :, :3],
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        routing_attention(**{"query": X, "key": X, "value": X, **arguments})


def test_bad_updates_are_named():
    with complains("decay: expected a number in [0, 1), got 1.0"):
        update_centroids(torch.ones(2, 5, 3), X, X, decay=1.0)
    with complains("centroids: expected (H, C, D) with H = 2, got float32 tensor of shape (1, 5, 3)"):
        update_centroids(torch.ones(1, 5, 3), X, X)
