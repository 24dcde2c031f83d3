"""Relative positions: each published form against its definition, against the others, and against published layers."""

from __future__ import annotations

import math

import pytest
import torch

import attnbook
from attnbook import measure
from attnbook.mechanisms import (
    alibi_attention,
    disentangled_attention,
    music_attention,
    rotary_attention,
    shaw_attention,
    t5_attention,
    transformer_xl_attention,
)
from attnbook.mechanisms.relative import skew
from attnbook.positions import ShawRelative, T5RelativeBias, alibi_bias
from helpers import array, assert_close, complains, name_of

LENGTHS = [(7, 7), (4, 9), (9, 4), (1, 6), (6, 1), (1, 1)]


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


def inputs(L: int, S: int, D: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(2, 4, L, D), draw(2, 2, S, D), draw(2, 2, S, 5)


@pytest.mark.parametrize(("L", "S"), LENGTHS)
def test_skewing_is_looking_up(L, S):
    by_distance = draw(2, L, L + S - 1)
    found = skew(by_distance, S)
    assert found.shape == (2, L, S)
    for i in range(L):
        for j in range(S):
            assert torch.equal(found[:, i, j], by_distance[:, i, j - i + L - 1])
    behind_only = skew(by_distance[..., :S], S)  # where keys ahead are masked, S columns do
    for i in range(L):
        seen = max(0, i + S - L + 1)
        assert torch.equal(behind_only[:, i, :seen], found[:, i, :seen])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("L", "S"), LENGTHS)
def test_causal_transformer_xl_needs_no_distances_ahead(L, S, per_head):
    q, k, v = inputs(L, S)
    table = draw(*((4,) if per_head else ()), L + S - 1, 6)
    biases = {"content_bias": draw(4, 6), "position_bias": draw(4, 6)}
    short = transformer_xl_attention(q, k, v, position_key=table[..., :S, :], is_causal=True, **biases)
    long = transformer_xl_attention(q, k, v, position_key=table, is_causal=True, **biases)
    assert_close(short, long)
    arrays = map(array, (q, k, v))
    options = {name: array(x) for name, x in biases.items()}
    expected = attnbook.reference.transformer_xl_attention(
        *arrays, position_key=array(table[..., :S, :]), is_causal=True, **options
    )
    assert_close(short, expected)


def test_the_forms_meet_where_their_parameters_agree():
    # Without biases, Transformer-XL is Shaw with an unclipped table and no values; causal, it is the Music Transformer.
    L, S = 5, 9
    q, k, v = inputs(L, S)
    half = draw(S, 6)  # distances S − 1, …, 0
    reach = S - 1
    ahead = draw(reach, 6)
    none = torch.zeros(4, 6, dtype=torch.float64)
    shaw = shaw_attention(q, k, v, key_table=torch.cat([half, ahead]))
    every = torch.cat([half, ahead[: L - 1]])
    assert_close(transformer_xl_attention(q, k, v, position_key=every, content_bias=none, position_bias=none), shaw)
    causal = shaw_attention(q, k, v, key_table=torch.cat([half, ahead]), is_causal=True)
    assert_close(music_attention(q, k, v, table=half), causal)
    assert not torch.allclose(causal, shaw)


@pytest.mark.parametrize("rows", [1, 3, 6, 20])
def test_music_clips_long_distances_and_ignores_rows_that_nobody_reaches(rows):
    q, k, v = inputs(6, 6)
    table = draw(4, rows, 6)
    wide = torch.cat([table[:, :1].expand(4, 20, 6), table], 1)  # the first row again and again
    assert_close(music_attention(q, k, v, table=table), music_attention(q, k, v, table=wide))


def test_tables_of_zeros_give_plain_attention():
    q, k, v = inputs(5, 8)
    zeros = torch.zeros(9, 6, dtype=torch.float64)
    plain = attnbook.attention(q, k, v)
    assert_close(shaw_attention(q, k, v, key_table=zeros), plain)
    third = attnbook.attention(q, k, v, scale=(3 * 6) ** -0.5)
    assert_close(disentangled_attention(q, k, v, position_key=zeros[1:], position_query=zeros[1:]), third)
    assert_close(t5_attention(q, k, v, table=zeros[:8, :4], scale=6**-0.5), plain)


def test_the_functions_agree_with_the_modules():
    q, k, v = inputs(6, 9)
    q, k, v = q, k, torch.cat([v, v[..., :1]], -1)  # Shaw's module has Dv = D
    shaw = ShawRelative(6, max_distance=3).double()
    bias = shaw(q, 9)
    mixed, weights = attnbook.attention(q, k, v, bias=bias, return_weights=True)
    found = shaw_attention(q, k, v, key_table=shaw.keys, value_table=shaw.value_table)
    assert_close(found, mixed + shaw.values(weights))
    t5 = T5RelativeBias(4, num_buckets=8, max_distance=20).double()
    assert_close(
        t5_attention(q, k, v, table=t5.table, max_distance=20), attnbook.attention(q, k, v, bias=t5(6, 9), scale=1.0)
    )
    assert_close(alibi_attention(q, k, v), attnbook.attention(q, k, v, bias=alibi_bias(4, 6, 9).double()))


def test_alibi_in_float64_has_slopes_in_float64():
    q, k, v = draw(1, 6, 3, 4), draw(1, 6, 50, 4), draw(1, 6, 50, 4)  # 6 heads: slopes that float32 would round
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], dtype=torch.float64)
    distance = (torch.arange(3)[:, None] + 47 - torch.arange(50)).abs()
    assert_close(alibi_attention(q, k, v), attnbook.attention(q, k, v, bias=-slopes[:, None, None] * distance))
    q, k, v = (x[:, [0, 0, 1]] for x in (q, k, v))  # 3 heads: 2^(−4), 2^(−8), 2^(−2)
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=torch.float64)
    assert_close(alibi_attention(q, k, v), attnbook.attention(q, k, v, bias=-slopes[:, None, None] * distance))
    sixteen = alibi_bias(16, 1, 2, dtype=torch.float64)[:, 0, 0]
    assert sixteen.tolist() == [-(2.0 ** (-i / 2)) for i in range(1, 17)]


@pytest.mark.parametrize("function", [alibi_attention, rotary_attention])
def test_scores_depend_on_differences_of_positions_only(function):
    # The last queries of a longer sequence see what the queries of its end alone see.
    q, k, v = inputs(4, 10)
    window = torch.zeros(10, dtype=torch.bool)
    window[3:] = True
    assert_close(function(q, k, v, attn_mask=window), function(q, k[:, :, 3:], v[:, :, 3:]), times=4)


def test_t5_splits_buckets_by_direction_unless_causal():
    q, k, v = (torch.zeros(1, 1, 5, 2, dtype=torch.float64) for _ in range(3))
    v[0, 0, :, 0] = torch.arange(5)
    table = draw(4, 1)
    # Causal, 4 buckets: 0, 1, 2 to 3, from 4 on. With two for either direction: 0, the rest.
    weights = torch.softmax(table[[3, 2, 2, 1, 0], 0], 0)
    found = t5_attention(q, k, v, table=table, max_distance=8, is_causal=True)[0, 0, -1, 0]
    assert found.item() == pytest.approx(float(weights @ v[0, 0, :, 0]), abs=1e-12)
    both = t5_attention(q, k, v, table=table, max_distance=8, is_causal=True, bidirectional=True)[0, 0, -1, 0]
    weights = torch.softmax(table[[1, 1, 1, 1, 0], 0], 0)
    assert both.item() == pytest.approx(float(weights @ v[0, 0, :, 0]), abs=1e-12)


@pytest.mark.parametrize("pairing", ["halves", "interleaved"])
@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_rotary_in_both_pairings(pairing, base):
    q, k, v = inputs(5, 9)
    found = rotary_attention(q, k, v, base=base, pairing=pairing, is_causal=True)
    arrays = map(array, (q, k, v))
    expected = attnbook.reference.rotary_attention(*arrays, base=base, pairing=pairing, is_causal=True)
    assert_close(found, expected)


CALLS = {
    "shaw": lambda q, k, v, t: shaw_attention(q, k, v, key_table=t[:5], value_table=t[:3, :2], is_causal=True),
    "xl": lambda q, k, v, t: transformer_xl_attention(
        q, k, v, position_key=t, content_bias=t[:2], position_bias=t[2:4]
    ),
    "music": lambda q, k, v, t: music_attention(q, k, v, table=t[:4]),
    "deberta": lambda q, k, v, t: disentangled_attention(q, k, v, position_key=t[:4], position_query=t[2:6]),
    "t5": lambda q, k, v, t: t5_attention(q, k, v, table=t[:4, :2], max_distance=8),
    "alibi": lambda q, k, v, t: alibi_attention(q, k, v),
    "rotary": lambda q, k, v, t: rotary_attention(q, k, v),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    sizes = ((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2), (6, 4))
    assert torch.autograd.gradcheck(CALLS[name], tuple(draw(*s).requires_grad_() for s in sizes))


def test_skewing_builds_no_tensor_of_pairs_and_components():
    # The definition gathers (L, S, D); here D = 64 would make it 64 times the matrix of scores.
    n = 256
    q, table = torch.zeros(1, 1, n, 64), torch.zeros(n, 64)
    pairs = n * n * 4
    assert measure.peak_memory(lambda: music_attention(q, q, q, table=table)) < 8 * pairs
    key_table = torch.zeros(2 * n - 1, 64)
    assert measure.peak_memory(lambda: shaw_attention(q, q, q, key_table=key_table)) < 12 * pairs


def deberta(size: int, heads: int, reach: int):
    """Make Hugging Face's layer, in float64, without buckets of distances."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = transformers.DebertaV2Config(
        hidden_size=size,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=reach,
        position_buckets=-1,
    )
    return DisentangledSelfAttention(config).double().eval()


@pytest.mark.parametrize(("n", "reach"), [(6, 8), (8, 8), (12, 8)], ids=name_of)
def test_disentangled_attention_equals_hugging_faces_layer(n, reach):
    layer, x, distances = deberta(12, 2, reach), draw(3, n, 12), draw(2 * reach, 12)
    mask = torch.ones(3, 1, n, n, dtype=torch.bool)
    mask[1, ..., n - 2 :] = False
    expected = layer(x, mask, rel_embeddings=distances)[0]
    heads = lambda y: y.unflatten(-1, (2, 6)).transpose(-3, -2)  # noqa: E731
    r, s = heads(layer.pos_key_proj(distances)), heads(layer.pos_query_proj(distances))
    # The layer takes row δ(i, j) of s where the paper has δ(j, i); the two are the same row of a reversed table, up to
    # the clipped ends: rows 0 and 2k − 1 belong to the distances ≤ −k and ≥ k − 1.
    reversed_rows = torch.cat([s[:, -1:], s[:, 1:].flip(1)], 1)
    q, k, v = (heads(p(x)) for p in (layer.query_proj, layer.key_proj, layer.value_proj))
    found = disentangled_attention(q, k, v, attn_mask=mask, position_key=r, position_query=reversed_rows)
    found = found.transpose(1, 2).flatten(2)
    if n <= reach:
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)  # the layer takes the root of 3D in float32
    else:  # beyond the reach, the two clip at ends that differ by one distance
        assert (found - expected).abs().max() > 1e-3
    unreversed = disentangled_attention(q, k, v, attn_mask=mask, position_key=r, position_query=s)
    assert (unreversed.transpose(1, 2).flatten(2) - expected).abs().max() > 1e-3


X = torch.zeros(2, 4, 3, 8)
ZEROS = torch.zeros(4, 8)
BAD = {
    "key_table: expected (R, 8) or (4, R, 8) with an odd number R = 2k + 1 of rows, got shape (4, 8)": (
        shaw_attention,
        {"key_table": ZEROS},
    ),
    "key_table: expected (R, 8) or (4, R, 8) with an odd number R = 2k + 1 of rows, got shape (2, 3, 8)": (
        shaw_attention,
        {"key_table": torch.zeros(2, 3, 8)},
    ),
    "value_table: expected (R, 8) or (4, R, 8) with an odd number R = 2k + 1 of rows, got shape (3, 7)": (
        shaw_attention,
        {"key_table": ZEROS[:3], "value_table": ZEROS[:3, :7]},
    ),
    "position_key: expected (R, 8) or (4, R, 8) with R = L + S − 1 = 5 rows, got shape (3, 8)": (
        transformer_xl_attention,
        {"position_key": ZEROS[:3], "content_bias": ZEROS, "position_bias": ZEROS},
    ),
    "position_key: expected (R, 8) or (4, R, 8) with R = L + S − 1 = 5 rows, or R = S = 3, got shape (4, 8)": (
        transformer_xl_attention,
        {"position_key": ZEROS, "content_bias": ZEROS, "position_bias": ZEROS, "is_causal": True},
    ),
    "position_bias: expected (H, D) = (4, 8), got shape (3, 8)": (
        transformer_xl_attention,
        {"position_key": ZEROS, "content_bias": ZEROS, "position_bias": ZEROS[:3]},
    ),
    "table: expected (R, 8) or (4, R, 8) with R ≥ 1 rows, got shape (4, 7)": (music_attention, {"table": ZEROS[:, :7]}),
    "table: expected a tensor (…, R, D), got None": (music_attention, {"table": None}),
    "position_query: expected (R, 8) or (4, R, 8) with an even number R = 2k of rows, got shape (3, 8)": (
        disentangled_attention,
        {"position_key": ZEROS, "position_query": ZEROS[:3]},
    ),
    "table: expected (R, H) with H = 4, got shape (8, 3)": (t5_attention, {"table": torch.zeros(8, 3)}),
    "num_buckets: expected an even integer, got 5": (t5_attention, {"table": torch.zeros(5, 4)}),
    "head_dim: expected an even integer, got 7": (rotary_attention, {"query": X[..., :7], "key": X[..., :7]}),
    "query: expected no NaN, got 192 NaN of 192 elements": (alibi_attention, {"query": X * math.nan}),
}


@pytest.mark.parametrize(("text", "call"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, call):
    function, arguments = call
    with complains(text):
        function(**{"query": X, "key": X, "value": X, **arguments})
