"""Sparse patterns: their limits, their kinship, what they cost, and the packages that have them too."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import attnbook
import conformance
from attnbook import catalog, masks
from attnbook.catalog.sparse import ROWS
from attnbook.measure import count_flops, peak_memory
from attnbook.mechanisms import (
    bigbird_attention,
    block_sparse_attention,
    document_attention,
    global_token_attention,
    longformer_attention,
    sliding_window_attention,
    strided_attention,
)
from attnbook.mechanisms.block_sparse import draw_random_blocks
from attnbook.mechanisms.sliding_window import window_tiles
from attnbook.shapes import AttentionShape
from helpers import assert_close, complains, name_of

NAMES = tuple(row.function.__name__ for row in ROWS)


def inputs(L: int, S: int | None = None, *, heads: int = 2, D: int = 4, batch: int = 2, dtype=torch.float64):
    S = L if S is None else S
    return [torch.randn(batch, heads, n, D, dtype=dtype).requires_grad_() for n in (L, S, S)]


def same(found, expected, q, k, v):
    """Assert that two forms agree, and their gradients."""
    assert_close(found, expected)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(output, (q, k, v), weight, retain_graph=True) for output in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, gradient=True)


def weights(function, n: int, **options) -> torch.Tensor:
    """Return the weights (n, n) that a mechanism gives: what it makes of the values 1 0 0 …, 0 1 0 …, …"""
    q, k = torch.randn(2, 1, 1, n, 4)
    return function(q, k, torch.eye(n)[None, None], **options)[0, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_values_as_wide_as_keys_take_the_fused_kernel_to_the_same_result(name, dtype, is_causal, monkeypatch):
    monkeypatch.setattr(conformance, "DV", conformance.D)  # the conformance suite's values are narrower
    monkeypatch.setattr(conformance, "LENGTHS", ((100, 100), (70, 90)))
    monkeypatch.setattr(conformance, "slope_error", lambda *arguments: 0.0)
    conformance.run(conformance.Case(name, dtype, is_causal, grouped=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_gradcheck(name, is_causal):
    q, k, v = inputs(20, heads=1, D=2, batch=1)
    row = catalog.MECHANISMS[name]
    options = row.example(AttentionShape(1, 1, 1, 20, 20, 2, 2), torch.Generator().manual_seed(0))
    mask = torch.rand(20, 20) < 0.7
    mask[3] = False

    def call(q, k, v):
        return row.function(q, k, v, is_causal=is_causal, attn_mask=mask, **options)

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("lengths", [(80, 80), (70, 90), (90, 70)], ids=name_of)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_patterns_are_those_of_the_masks(lengths, is_causal):
    q, k, v = inputs(*lengths)
    window = masks.sliding_window(*lengths, window=9, causal=is_causal)
    expected = attnbook.attention(q, k, v, attn_mask=window, backend="reference")
    same(sliding_window_attention(q, k, v, window=9, is_causal=is_causal), expected, q, k, v)
    layout = torch.rand(2, 1, -(-lengths[0] // 32), -(-lengths[1] // 32)) < 0.6
    blocks = masks.block(layout, block_size=32, L=lengths[0], S=lengths[1])
    expected = attnbook.attention(q, k, v, attn_mask=blocks, is_causal=is_causal, backend="reference")
    same(block_sparse_attention(q, k, v, layout=layout, block_size=32, is_causal=is_causal), expected, q, k, v)


def test_documents_are_those_of_the_mask_in_one_piece_or_not():
    q, k, v = inputs(150)
    for ids in (torch.arange(150)[None].repeat(2, 1) // 80, torch.randint(3, (2, 150)), torch.arange(150)[None] % 2):
        expected = attnbook.attention(q, k, v, attn_mask=masks.document(ids), is_causal=True, backend="reference")
        same(document_attention(q, k, v, ids=ids, is_causal=True), expected, q, k, v)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(70, 70), (30, 50), (50, 30), (1, 40)], ids=name_of)
def test_patterns_wide_enough_are_dense_attention(lengths, is_causal):
    q, k, v = inputs(*lengths)
    expected = attnbook.attention(q, k, v, is_causal=is_causal, backend="reference")
    every = torch.ones(lengths[1], dtype=torch.bool)
    found = [
        sliding_window_attention(q, k, v, window=10**9, is_causal=is_causal),
        strided_attention(q, k, v, stride=1, is_causal=is_causal),
        strided_attention(q, k, v, stride=10**9, is_causal=is_causal),
        block_sparse_attention(q, k, v, layout=torch.ones(1, 1, dtype=torch.bool), block_size=100, is_causal=is_causal),
        longformer_attention(q, k, v, window=1, global_tokens=every, is_causal=is_causal),
    ]
    if lengths[0] == lengths[1]:
        found.append(document_attention(q, k, v, ids=torch.zeros(lengths[0], dtype=torch.uint8), is_causal=is_causal))
        found.append(bigbird_attention(q, k, v, block_size=10, window_blocks=15, is_causal=is_causal))
        found.append(bigbird_attention(q, k, v, block_size=10, global_blocks=7, is_causal=is_causal))
    for output in found:
        same(output, expected, q, k, v)


def test_global_tokens_and_a_window_make_longformer():
    tokens = torch.zeros(60, dtype=torch.bool)
    tokens[[0, 31]] = True
    for is_causal in (False, True):
        both = weights(longformer_attention, 60, window=4, global_tokens=tokens, is_causal=is_causal) > 0
        near = weights(sliding_window_attention, 60, window=4, is_causal=is_causal) > 0
        through = weights(global_token_attention, 60, global_tokens=tokens, is_causal=is_causal) > 0
        assert torch.equal(both, near | through)
        assert through[31].sum() == (32 if is_causal else 60)
    none = torch.zeros(60, dtype=torch.bool)
    assert (weights(global_token_attention, 60, global_tokens=none) == 0).all()


def test_a_dilated_window_is_as_dense_as_a_plain_one():
    for dilation in (1, 2, 5):
        seen = weights(sliding_window_attention, 90, window=6, dilation=dilation, is_causal=True) > 0
        assert seen.sum(-1).tolist() == [min(6, i // dilation + 1) for i in range(90)]


def test_two_layers_of_strided_attention_join_any_two_places():
    seen = (weights(strided_attention, 64, stride=8, is_causal=True) > 0).double()
    assert seen.sum(-1).max() <= 2 * 8
    assert torch.equal(seen @ seen > 0, masks.causal(64))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_random_blocks_are_new_and_distinct(is_causal):
    rules = {"window_blocks": 5, "global_blocks": 2, "is_causal": is_causal}
    drawn = draw_random_blocks(20, 4, generator=torch.Generator().manual_seed(0), **rules)
    assert torch.equal(drawn, draw_random_blocks(20, 4, generator=torch.Generator().manual_seed(0), **rules))
    assert not torch.equal(drawn, draw_random_blocks(20, 4, generator=torch.Generator().manual_seed(1), **rules))
    for row, blocks in enumerate(drawn.tolist()):
        chosen = [block for block in blocks if block != row]
        assert len(set(chosen)) == len(chosen)
        assert all(abs(block - row) > 2 and block >= 2 for block in chosen)
        assert all(block < row for block in chosen) or not is_causal
        left = sum(abs(block - row) > 2 and (block < row or not is_causal) for block in range(2, 20))
        assert len(chosen) == (0 if row < 2 else min(4, left))


def test_every_far_block_is_drawn_equally_often():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_random_blocks(8, 1, generator=generator)[4, 0] for _ in range(1200)])
    counts = draws.bincount(minlength=8)
    assert counts[[0, 3, 4, 5]].tolist() == [0, 0, 0, 0]
    assert all(240 < count < 360 for count in counts[[1, 2, 6, 7]])  # 300 ± 4 standard deviations


def test_bigbird_is_block_sparse_attention_with_its_layout():
    q, k, v = inputs(100)
    drawn = torch.stack([draw_random_blocks(7, 2, generator=torch.Generator().manual_seed(s)) for s in range(2)])
    places = torch.arange(7)
    layout = (places[:, None] - places).abs() <= 1
    layout = layout | (places == 0) | (places[:, None] == 0)
    layout = layout.repeat(2, 1, 1).scatter(2, drawn, True)
    for is_causal in (False, True):
        found = bigbird_attention(q, k, v, block_size=16, random_blocks=drawn, is_causal=is_causal)
        expected = block_sparse_attention(q, k, v, layout=layout, block_size=16, is_causal=is_causal)
        same(found, expected, q, k, v)
    first, second = (
        bigbird_attention(q, k, v, block_size=8, generator=torch.Generator().manual_seed(s)) for s in (0, 0)
    )
    assert torch.equal(first, second)


def test_no_query_is_in_two_tiles():
    for L, S, window, dilation, is_causal in itertools.product((1, 130), (1, 150), (1, 70), (1, 3), (False, True)):
        shape = AttentionShape(1, 1, 1, L, S, 1, 1)
        device = torch.device("cpu")
        tiles = window_tiles(shape, window=window, dilation=dilation, is_causal=is_causal, device=device)
        rows = [row for tile in tiles for row in tile.rows]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(L))


def long(function, n: int, backward: bool, **options):
    q, k, v = inputs(n, heads=1, D=16, batch=1, dtype=torch.float32)

    def call():
        output = function(q, k, v, **options)
        return torch.autograd.grad(output.sum(), (q, k, v)) if backward else output

    return call


LINEAR = {
    sliding_window_attention: lambda n: {"window": 32, "is_causal": True},
    longformer_attention: lambda n: {"window": 32, "global_tokens": torch.arange(n) < 2},
    bigbird_attention: lambda n: {"block_size": 32, "generator": torch.Generator().manual_seed(0)},
    document_attention: lambda n: {"ids": torch.arange(n) // 128, "is_causal": True},
}


@pytest.mark.parametrize("function", LINEAR, ids=lambda function: function.__name__)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_work_and_memory_grow_linearly(function, backward):
    small, large = (long(function, n, backward, **LINEAR[function](n)) for n in (512, 2048))
    assert count_flops(large) < 5 * count_flops(small)  # 4 for linear, 16 for quadratic growth
    held = peak_memory(large)
    assert held < 6 * peak_memory(small)
    assert held < 2048 * 2048 * 4 / 4


@pytest.mark.parametrize("D", [16, 8])
def test_one_long_document_is_not_a_matrix(D):
    q, k, v = inputs(2048, heads=1, D=16, batch=1, dtype=torch.float32)
    v = torch.randn(1, 1, 2048, D, requires_grad=True)
    ids = torch.zeros(2048, dtype=torch.int64)

    def call():
        torch.autograd.grad(document_attention(q, k, v, ids=ids, is_causal=True).sum(), (q, k, v))

    assert peak_memory(call) < 2048 * 2048 * 4 / 4


@pytest.mark.parametrize("stride", [16, 32])
def test_strided_attention_costs_n_times_stride_plus_n_over_stride(stride):
    n = 1024
    pairs = count_flops(long(strided_attention, n, False, stride=stride, is_causal=True)) / (4 * 16)
    wanted = n * (stride + n / stride)
    assert wanted / 2 < pairs < 4 * wanted  # tiles of 64 queries, triangles counted whole
    assert pairs < n * n / 2


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = inputs(9)
    (gradient,) = torch.autograd.grad(sliding_window_attention(q, k, v, window=3).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_that_nobody_wants_are_left_out():
    q, k, v = inputs(9)
    output = strided_attention(q.detach(), k, v.detach(), stride=3)
    (gradient,) = torch.autograd.grad(output.sum(), (k,))
    assert gradient.shape == k.shape


def test_longformer_of_transformers_agrees():
    transformers = pytest.importorskip("transformers")
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=8,
        num_attention_heads=2,
        attention_window=[6],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    for name in ("query", "key", "value"):  # theirs has projections of their own for global tokens
        getattr(layer, name + "_global").load_state_dict(getattr(layer, name).state_dict())
    x = torch.randn(2, 24, 8)
    for tokens in (torch.zeros(2, 24, dtype=torch.bool), torch.rand(2, 24) < 0.2):
        with torch.no_grad():
            theirs = layer(
                x,
                attention_mask=tokens * 10000.0,
                is_index_masked=torch.zeros(2, 24, dtype=torch.bool),
                is_index_global_attn=tokens,
                is_global_attn=bool(tokens.any()),
            )[0]
            q, k, v = (getattr(layer, name)(x).view(2, 24, 2, 4).transpose(1, 2) for name in ("query", "key", "value"))
            ours = longformer_attention(q, k, v, window=4, global_tokens=tokens)  # 3 on either side, and the own place
        assert torch.allclose(ours.transpose(1, 2).reshape(2, 24, 8), theirs, atol=1e-6)


def test_bigbird_of_transformers_agrees_in_training_and_counts_its_first_block_several_times_in_evaluation():
    transformers = pytest.importorskip("transformers")
    from transformers.models.big_bird import modeling_big_bird as theirs

    config = transformers.BigBirdConfig(
        hidden_size=8, num_attention_heads=2, block_size=4, num_random_blocks=2, attention_probs_dropout_prob=0
    )
    layer = theirs.BigBirdBlockSparseAttention(config, seed=0)
    drawn = []
    draw = layer._bigbird_block_rand_mask_with_head
    layer._bigbird_block_rand_mask_with_head = lambda *args, **rest: drawn.append(draw(*args, **rest)) or drawn[-1]
    x = torch.randn(1, 48, 8)
    blocks, band, rows, columns = theirs.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, 48), 4)
    given = {"band_mask": band, "from_mask": rows, "to_mask": columns}

    def call() -> torch.Tensor:
        with torch.no_grad():
            return layer(x, **given, from_blocked_mask=blocks, to_blocked_mask=blocks)[0].view(1, 48, 2, 4)

    places = torch.arange(12)
    layout = ((places[:, None] - places).abs() <= 1).repeat(2, 1, 1)
    for end in (0, -1):  # theirs has a global block at either end
        layout[:, end] = layout[:, :, end] = True
    q, k, v = (getattr(layer, name)(x).view(1, 48, 2, 4).transpose(1, 2).detach() for name in ("query", "key", "value"))
    found = call().transpose(1, 2)
    chosen = layout.clone()
    chosen[:, 1:-1] = layout[:, 1:-1].scatter(2, torch.from_numpy(np.stack(drawn[-1])).long(), True)
    ours = block_sparse_attention(q, k, v, layout=chosen, block_size=4)
    assert torch.allclose(found, ours, atol=1e-6)

    layer.eval()  # all "random" blocks are now the first one, which is global too: its keys count 1 + 2 times
    found = call().transpose(1, 2)
    assert (np.stack(drawn[-1]) == 0).all()
    bias = torch.zeros(48, 48)
    bias[4:-4, :4] = math.log(3)
    expected = attnbook.attention(q, k, v, attn_mask=masks.block(layout, block_size=4), bias=bias)
    assert torch.allclose(found, expected, atol=1e-6)
    once = block_sparse_attention(q, k, v, layout=layout, block_size=4)
    assert not torch.allclose(found, once, atol=1e-3)


Q = torch.zeros(2, 4, 10, 8)
YES = torch.ones(10, dtype=torch.bool)
BAD = [
    (sliding_window_attention, {"window": 0}, "window: expected an integer ≥ 1, got 0"),
    (sliding_window_attention, {"window": 2.0}, "window: expected an integer ≥ 1, got 2.0"),
    (sliding_window_attention, {"window": 3, "dilation": 0}, "dilation: expected an integer ≥ 1, got 0"),
    (sliding_window_attention, {"window": 3, "query": Q * float("nan")}, "query: expected no NaN, got 640 NaN of …"),
    (sliding_window_attention, {"window": 3, "attn_mask": YES[:4]}, "attn_mask: expected broadcastable to …"),
    (strided_attention, {"stride": 0}, "stride: expected an integer ≥ 1, got 0"),
    (
        global_token_attention,
        {"global_tokens": torch.tensor([0, 3])},
        "global_tokens: expected a bool tensor, got int64 tensor of shape (2,)",
    ),
    (
        longformer_attention,
        {"window": 2, "global_tokens": YES[:9]},
        "global_tokens: expected broadcastable to (B, S) = (2, 10), got bool tensor of shape (9,)",
    ),
    (longformer_attention, {"window": 0, "global_tokens": YES}, "window: expected an integer ≥ 1, got 0"),
    (
        block_sparse_attention,
        {"layout": torch.ones(2, 2, dtype=torch.bool), "block_size": 4},
        "layout: expected (…, 3, 3), to fit L = 10, S = 10 and block_size = 4, got bool tensor of shape (2, 2)",
    ),
    (
        block_sparse_attention,
        {"layout": torch.ones(2, 2), "block_size": 5},
        "layout: expected a bool tensor, got float32 tensor of shape (2, 2)",
    ),
    (
        block_sparse_attention,
        {"layout": torch.ones(3, 2, 2, dtype=torch.bool), "block_size": 5},
        "layout: expected broadcastable to (B, H, rows, columns) = (2, 4, 2, 2), got bool tensor of shape (3, 2, 2)",
    ),
    (
        block_sparse_attention,
        {"layout": torch.ones(2, 2, dtype=torch.bool), "block_size": 0},
        "block_size: expected an integer ≥ 1, got 0",
    ),
    (
        bigbird_attention,
        {"window_blocks": 2},
        "window_blocks: expected an odd integer: as many on either side of the middle, got 2",
    ),
    (bigbird_attention, {"global_blocks": -1}, "global_blocks: expected an integer ≥ 0, got -1"),
    (bigbird_attention, {"num_random_blocks": -1}, "num_random_blocks: expected an integer ≥ 0, got -1"),
    (
        bigbird_attention,
        {"block_size": 4, "random_blocks": torch.zeros(3, 1)},
        "random_blocks: expected int64 indices of blocks in [0, 3), (n, r) or (H, n, r) with n = 3 and H = 4, "
        "got float32 tensor of shape (3, 1)",
    ),
    (bigbird_attention, {"block_size": 4, "random_blocks": torch.zeros(2, 1).long()}, "random_blocks: …(2, 1)"),
    (
        bigbird_attention,
        {"block_size": 4, "random_blocks": torch.full((3, 1), 3)},
        "random_blocks: …from 3 to 3",
    ),
    (bigbird_attention, {"key": Q[:, :, :9], "value": Q[:, :, :9]}, "key: expected as many positions …"),
    (document_attention, {"ids": torch.zeros(10)}, "ids: expected a int64 or int32 or int16 or uint8 tensor, got …"),
    (document_attention, {"ids": torch.zeros(9).long()}, "ids: expected broadcastable to (B, L) = (2, 10), got …"),
    (document_attention, {"ids": YES.long(), "key": Q[:, :, :9], "value": Q[:, :, :9]}, "key: expected as many …"),
]


@pytest.mark.parametrize(("function", "arguments", "text"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named(function, arguments, text):
    with complains(text):
        function(**{"query": Q, "key": Q, "value": Q, **arguments})
