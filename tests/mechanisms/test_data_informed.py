"""Data-informed sparsity: averages, patterns of an exact density, and attention that skips what is not used."""

from __future__ import annotations

import pytest
import torch

from attnbook import masks, reference
from attnbook.mechanisms import data_informed_attention, tiled_attention
from attnbook.mechanisms.data_informed import AttentionAverage, pattern_at_density, random_pattern
from helpers import array, assert_close, complains


def inputs(L: int, S: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 2):
    sizes = ((heads, L, 5), (kv_heads, S, 5), (kv_heads, S, 3))
    return tuple(torch.randn(batch, h, n, d, dtype=torch.float64).requires_grad_() for h, n, d in sizes)


def test_the_average_is_the_mean_over_all_sequences():
    batches = [torch.rand(n, 3, 6, 6) for n in (2, 5, 1)]
    average = AttentionAverage(3, 6)
    for weights in batches:
        average.add(weights)
    assert torch.allclose(average.mean(), torch.cat(batches).double().mean(0))


def test_short_sequences_count_where_they_reach():
    average = AttentionAverage(1, 3, 4)
    average.add(torch.ones(2, 1, 3, 3))
    average.add(torch.zeros(2, 1, 2, 2))
    expected = torch.tensor([[0.5, 0.5, 1, 0], [0.5, 0.5, 1, 0], [1, 1, 1, 0]], dtype=torch.float64)
    assert torch.equal(average.mean()[0], expected)


@pytest.mark.parametrize("density", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_patterns_keep_the_largest_and_exactly_as_many_as_said(density, causal, generator):
    average = torch.rand(4, 12, 12, generator=generator)
    average[:2] *= 0.5
    allowed = masks.causal(12) if causal else torch.ones(12, 12, dtype=torch.bool)
    together = pattern_at_density(average, density, allowed=allowed)
    each = pattern_at_density(average, density, allowed=allowed, across_heads=False)
    random = random_pattern(4, 12, density=density, allowed=allowed, generator=generator)
    number = int(allowed.sum())
    assert together.sum() == round(density * 4 * number)
    for pattern in (each, random):
        assert (pattern.sum((1, 2)) == round(density * number)).all()
    for pattern in (together, each, random):
        assert not (pattern & ~allowed).any()
    if density < 1:
        assert average[together].min() >= average[~together & allowed].max()
        assert together[:2].sum() < 0.6 * together[2:].sum()  # one threshold: weaker heads keep less
        for h in range(4):
            assert average[h][each[h]].min() >= average[h][~each[h] & allowed].max()


def test_ties_do_not_change_the_number():
    assert pattern_at_density(torch.zeros(2, 5, 5), 0.2).sum() == 10


def test_a_pattern_from_data_loses_less_than_a_random_one(generator):
    # Planted: each head looks at a place of its own; queries and keys of new data agree on it, up to noise.
    n, offsets = 32, (1, 4)

    def draw():
        place = torch.eye(n, dtype=torch.float64)
        q = torch.stack([8 * place.roll(offset, 0) for offset in offsets])[None]
        return q + torch.randn(1, 2, n, n, generator=generator, dtype=torch.float64), place.expand(1, 2, n, n)

    average = AttentionAverage(2, n)
    for _ in range(10):
        q, k = draw()
        average.add((q @ k.transpose(-1, -2)).softmax(-1))
    pattern = pattern_at_density(average.mean(), 0.1)
    q, k = draw()
    v = torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64)
    exact = tiled_attention(q, k, v, scale=1.0)

    def error(pattern):
        return float((data_informed_attention(q, k, v, pattern=pattern, scale=1.0) - exact).norm() / exact.norm())

    assert error(pattern) < 0.1
    assert error(random_pattern(2, n, density=0.1, generator=generator)) > 0.8


@pytest.mark.parametrize("lengths", [(20, 20), (9, 30), (30, 9)], ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_block_size_gives_the_reference(lengths, block_size, is_causal, generator):
    q, k, v = inputs(*lengths)
    mask = torch.rand(2, 1, *lengths, generator=generator) < 0.7
    for heads in (1, 4):
        pattern = torch.rand(heads, *lengths, generator=generator) < 0.2
        options = {"is_causal": is_causal}
        expected = reference.data_informed_attention(
            array(q), array(k), array(v), pattern=array(pattern), attn_mask=array(mask), **options
        )
        found = data_informed_attention(q, k, v, pattern=pattern, attn_mask=mask, block_size=block_size, **options)
        assert_close(found, expected)


def test_all_pairs_are_exact_and_none_gives_zero():
    q, k, v = inputs(6, 8)
    assert_close(
        data_informed_attention(q, k, v, pattern=torch.ones(1, 1, 8, dtype=torch.bool)), tiled_attention(q, k, v)
    )
    nothing = data_informed_attention(q, k, v, pattern=torch.zeros(6, 8, dtype=torch.bool))
    assert (nothing == 0).all()


def test_work_follows_the_columns_in_use():
    from attnbook.measure import count_flops

    q, k, v = inputs(256, 256, heads=1, kv_heads=1, batch=1)
    window = masks.sliding_window(256, window=32)
    full, some = (
        count_flops(lambda p=p: data_informed_attention(q, k, v, pattern=p, block_size=32))
        for p in (torch.ones(256, 256, dtype=torch.bool), window)
    )
    assert some < full * (2 * 32) / 256 + 1


def test_gradcheck(generator):
    q, k, v = inputs(5, 6, heads=2, kv_heads=1, batch=1)
    pattern = torch.rand(2, 5, 6, generator=generator) < 0.5
    assert torch.autograd.gradcheck(lambda *x: data_informed_attention(*x, pattern=pattern, block_size=2), (q, k, v))


def test_bad_arguments_are_named():
    x = torch.zeros(1, 2, 3, 4)
    with complains("pattern: expected broadcastable to (H, L, S) = (2, 3, 3), got bool tensor of shape (3, 3, 3)"):
        data_informed_attention(x, x, x, pattern=torch.ones(3, 3, 3, dtype=torch.bool))
    with complains("pattern: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 3)"):
        data_informed_attention(x, x, x, pattern=torch.ones(3, 3))
    with complains("block_size: expected an integer ≥ 1, got 0"):
        data_informed_attention(x, x, x, pattern=torch.ones(3, 3, dtype=torch.bool), block_size=0)
    with complains("density: expected a number in (0, 1], got 0"):
        pattern_at_density(torch.zeros(2, 3, 3), 0)
    with complains("density: expected a number in (0, 1], got 1.5"):
        random_pattern(2, 3, density=1.5)
    with complains("average: expected no NaN, got 18 NaN of 18 elements"):
        pattern_at_density(torch.full((2, 3, 3), torch.nan), 0.5)
    with complains("heads: expected an integer ≥ 1, got 0"):
        random_pattern(0, 3, density=0.5)
    with complains("L: expected an integer ≥ 1, got 0"):
        AttentionAverage(2, 0)
    with complains("weights: expected (B, 2, at most 3, at most 3), got float32 tensor of shape (1, 2, 4, 3)"):
        AttentionAverage(2, 3).add(torch.zeros(1, 2, 4, 3))
