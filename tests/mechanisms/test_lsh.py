"""LSH attention: the law of the hash, the union of rounds, and the Reformer of another library."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attnbook import reference
from attnbook.mechanisms import lsh_attention, tiled_attention
from attnbook.mechanisms.lsh import lsh_buckets
from helpers import array, assert_close, complains


def inputs(n: int, *, heads: int = 2, kv_heads: int = 2, batch: int = 2):
    sizes = ((heads, n, 6), (kv_heads, n, 6), (kv_heads, n, 3))
    return tuple(torch.randn(batch, h, n, d, dtype=torch.float64).requires_grad_() for h, n, d in sizes)


def collisions(angle: float, num_buckets: int, generator: torch.Generator) -> float:
    """Measure how often two vectors at an angle share a bucket, over 400 pairs and 50 hashes."""
    frames = torch.linalg.qr(torch.randn(400, 8, 2, generator=generator, dtype=torch.float64)).Q
    x, y = 3 * frames[..., 0], math.cos(angle) * frames[..., 0] + math.sin(angle) * frames[..., 1]  # lengths differ
    rotations = torch.randn(50, 8, num_buckets // 2, generator=generator, dtype=torch.float64)
    buckets = lsh_buckets(torch.stack([x, y]), rotations)  # (2, 50, 400)
    assert buckets.min() >= 0
    assert buckets.max() < num_buckets
    return float((buckets[0] == buckets[1]).double().mean())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_with_two_buckets_a_pair_meets_as_often_as_its_angle_says(share, generator):
    assert collisions(share * math.pi, 2, generator) == pytest.approx(1 - share, abs=0.02)  # > 5 σ


@pytest.mark.parametrize("num_buckets", [4, 8, 32])
def test_with_more_buckets_near_pairs_meet_and_others_do_not(num_buckets, generator):
    angles = [0, math.pi / 12, math.pi / 4, math.pi / 2, math.pi]
    chance = [collisions(angle, num_buckets, generator) for angle in angles]
    assert chance == sorted(chance, reverse=True)
    assert chance[0] == 1
    assert chance[3] == pytest.approx(1 / num_buckets, abs=0.02)
    assert chance[4] == 0


def test_more_buckets_favour_near_pairs_over_far_ones_more(generator):
    def contrast(num_buckets: int) -> float:  # ρ = ln p(near) / ln p(far): smaller is better
        near, far = (collisions(angle, num_buckets, generator) for angle in (math.pi / 8, math.pi / 2))
        return math.log(near) / math.log(far)

    assert contrast(64) < 0.8 * contrast(2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_chunk_and_no_regard_for_buckets_is_exact(is_causal):
    q, k, v = inputs(21)
    found = lsh_attention(q, k, v, num_buckets=4, num_hashes=3, chunk_size=21, across_buckets=True, is_causal=is_causal)
    assert_close(found, tiled_attention(q, k, v, is_causal=is_causal))


def test_many_rounds_come_close_to_exact_attention(generator):
    q, k, v = inputs(32)
    exact = tiled_attention(q, k, v)

    def error(rounds: int) -> float:
        tries = [
            lsh_attention(q, k, v, num_buckets=4, num_hashes=rounds, chunk_size=32, generator=generator)
            for _ in range(4)
        ]
        return sum(float((x - exact).norm().detach()) for x in tries) / 4

    errors = [error(rounds) for rounds in (1, 4, 16)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.25 * errors[0]


@pytest.mark.parametrize("options", [{}, {"self_last": True}, {"across_buckets": True}, {"count_once": False}])
@pytest.mark.parametrize("look_back", [0, 1, 3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_option_is_specified(options, look_back, is_causal, generator):
    q, k, v = inputs(29, heads=4)
    rotations = torch.randn(3, 6, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 29, generator=generator) < 0.8
    options = {**options, "look_back": look_back, "is_causal": is_causal, "chunk_size": 5}
    expected = reference.lsh_attention(
        array(q), array(k), array(v), rotations=array(rotations), attn_mask=array(mask), **options
    )
    assert_close(lsh_attention(q, k, v, rotations=rotations, attn_mask=mask, **options), expected)


def test_hidden_positions_act_as_if_absent(generator):
    q, k, v = inputs(24)
    rotations = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
    mask = torch.arange(24).view(1, 1, 1, 24) < 17
    found = lsh_attention(q, k, v, rotations=rotations, chunk_size=4, attn_mask=mask)
    alone = lsh_attention(*(x[:, :, :17] for x in (q, k, v)), rotations=rotations, chunk_size=4)
    assert torch.allclose(found[:, :, :17], alone, rtol=0, atol=1e-14)
    assert (found[:, :, 17:] == 0).all()


def test_a_shared_query_finds_itself_only_where_there_is_nothing_else(generator):
    x, _, v = inputs(16)
    rotations = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
    found = lsh_attention(x, F.normalize(x, dim=-1), v, rotations=rotations, chunk_size=16, self_last=True)
    buckets = lsh_buckets(x, rotations)[:, :, 0]
    same = buckets[..., None] == buckets[..., None, :]
    alone = same.sum(-1) == 1
    assert 0 < alone.sum() < alone.numel()
    assert torch.equal(found[alone], v[alone])
    assert not torch.isclose(found[~alone], v[~alone]).all(-1).any()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("look_back", [0, 1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_reformer_of_transformers_agrees(rounds, look_back, is_causal):
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    n, width, heads, chunk = 48, 12, 2, 8
    config = ReformerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        attention_head_size=width // heads,
        lsh_attn_chunk_length=chunk,
        lsh_num_chunks_before=look_back,
        lsh_num_chunks_after=0,
        num_buckets=6,
        num_hashes=rounds,
        hash_seed=3,
        is_decoder=is_causal,
        lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds=False,
        attn_layers=["lsh"],
    )
    # In float32 their weights of rounds with nothing but the query itself, at a score of −10⁵, sum to 0.997.
    layer = reformer.LSHSelfAttention(config).eval().double()
    states = torch.randn(2, n, width, dtype=torch.float64)
    with torch.no_grad():
        theirs = layer(states).hidden_states.view(2, n, heads, -1).transpose(1, 2)
        x, v = (p(states).view(2, n, heads, -1).transpose(1, 2) for p in (layer.query_key, layer.value))
    torch.manual_seed(3)
    drawn = torch.randn(heads, width // heads, rounds, 3, dtype=torch.float64)
    for head in range(heads):  # theirs has rotations of its own for each head
        rotations = drawn[head].permute(1, 0, 2)
        q, value = x[:, head : head + 1], v[:, head : head + 1]
        ours = lsh_attention(
            q,
            F.normalize(q, dim=-1),
            value,
            rotations=rotations,
            chunk_size=chunk,
            look_back=look_back,
            self_last=True,
            across_buckets=True,
            count_once=False,
            is_causal=is_causal,
            scale=1.0,  # theirs does not divide by √D once the keys have length 1
        )
        place = lsh_buckets(q, rotations).argsort(stable=True).argsort()  # (B, 1, R, n)
        inner = (place >= look_back * chunk).all(2)[:, 0]  # their first chunk looks back at the last one
        assert inner.any()
        close = torch.isclose(ours[:, 0], theirs[:, head], rtol=1e-4, atol=1e-5)  # they add 10⁻⁶ under the root.all(-1)
        assert close[inner].all()


def test_work_and_memory_grow_linearly():
    from attnbook.measure import count_flops, peak_memory

    def call(n: int):
        q = torch.randn(1, 1, n, 8)
        rotations = torch.randn(2, 8, 4)
        return lambda: lsh_attention(q, q, q, rotations=rotations, chunk_size=16)

    assert count_flops(call(2048)) == 4 * count_flops(call(512))
    assert peak_memory(call(2048)) < 5 * peak_memory(call(512))


def test_gradcheck(generator):
    q, k, v = inputs(7, batch=1)
    rotations = torch.randn(2, 6, 1, generator=generator, dtype=torch.float64)

    def call(q, k, v):
        return lsh_attention(q, k, v, rotations=rotations, chunk_size=3, is_causal=True)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_a_generator_decides(generator):
    q, k, v = inputs(20)
    calls = [lsh_attention(q, k, v, num_buckets=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], calls[2])


X = torch.zeros(1, 1, 4, 2)
ROTATIONS = torch.zeros(3, 2, 2)
BAD = {
    "num_buckets: expected an even number: each random axis gives two buckets, got 5": {"num_buckets": 5},
    "num_buckets: expected an even integer ≥ 2, where no rotations are given, got None": {},
    "num_buckets: expected an integer ≥ 2, got 0": {"num_buckets": 0},
    "num_hashes: expected an integer ≥ 1, got 0": {"num_buckets": 2, "num_hashes": 0},
    "num_buckets: expected 4, as the rotations have it, or nothing, got 2": {"rotations": ROTATIONS, "num_buckets": 2},
    "num_hashes: expected 3, as the rotations have it, or nothing, got 2": {"rotations": ROTATIONS, "num_hashes": 2},
    "rotations: expected (num_hashes, D = 2, num_buckets / 2), got float32 tensor of shape (3, 3, 2)": {
        "rotations": torch.zeros(3, 3, 2)
    },
    "chunk_size: expected an integer ≥ 1, got 0": {"num_buckets": 2, "chunk_size": 0},
    "look_back: expected an integer ≥ 0, got -1": {"num_buckets": 2, "look_back": -1},
    "key: expected as many positions as query has, S = L = 4, got shape (1, 1, 3, 2)": {
        "num_buckets": 2,
        "key": X[:, :, :3],
        "value": X[:, :, :3],
    },
    "attn_mask: expected a mask of keys…": {"num_buckets": 2, "attn_mask": torch.ones(4, 4, dtype=torch.bool)},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        lsh_attention(**{"query": X, "key": X, "value": X, **arguments})
