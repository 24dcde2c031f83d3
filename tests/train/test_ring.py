"""Ring attention and context parallelism: which positions go where, and what two processes compute together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import two_processes as two
from attnbook import attention
from attnbook.layers import MultiHeadAttention
from attnbook.mechanisms import tiled_attention
from attnbook.models import Decoder, DecoderConfig
from attnbook.train.ring import (
    ORDERS,
    ContextParallel,
    RingSelfAttention,
    _pieces,
    ring_attention,
    ring_work,
    slice_positions,
)
from helpers import assert_close, complains, tokens

SHAPES = {"plain": (2, 2, 2, 8, 4, 4), "grouped": (1, 4, 2, 12, 3, 5), "long": (1, 2, 1, 72, 4, 4)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = two.Pair(str(tmp_path_factory.mktemp("pair") / "store"))
    yield pair
    pair.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_each_position_has_one_holder(order, size):
    slices = [slice_positions(60, size, rank, order) for rank in range(size)]
    assert torch.cat(slices).sort().values.equal(torch.arange(60))
    for positions in slices:
        assert len(positions) == 60 // size
        assert (positions.diff() > 0).all()


def test_orders_by_hand():
    assert slice_positions(8, 2, 1, "contiguous").tolist() == [4, 5, 6, 7]
    assert slice_positions(8, 2, 0, "zigzag").tolist() == [0, 1, 6, 7]
    assert slice_positions(8, 2, 1, "zigzag").tolist() == [2, 3, 4, 5]
    assert slice_positions(8, 2, 1, "striped").tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_the_pieces_are_the_causal_mask(order, size):
    length = 4
    for mine in range(size):
        for theirs in range(size):
            i, j = (slice_positions(size * length, size, rank, order) for rank in (mine, theirs))
            found = torch.zeros(length, length, dtype=torch.int64)
            for rows, columns, diagonal in _pieces(length, size, mine, theirs, order, True):
                block = torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.int64)
                found[rows, columns] += block.tril() if diagonal else block
            assert found.equal((j <= i[:, None]).long())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_work_is_balanced_unless_slices_are_contiguous(size):
    L = 64 * size
    work = {order: ring_work(L, size, order) for order in ORDERS}
    for rows in work.values():
        assert sum(map(sum, rows)) == L * (L + 1) // 2
    wait = {order: sum(max(row) for row in rows) for order, rows in work.items()}
    even = L * (L + 1) / 2 / size
    assert all(len(set(row)) == 1 for row in work["zigzag"])
    assert wait["zigzag"] == even
    assert even < wait["striped"] < 1.02 * even
    assert wait["contiguous"] > (2 - 1.02 / size) * even  # nearly what a ring without causality costs
    assert sum(max(row) for row in ring_work(L, size, is_causal=False)) == L * L // size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_attend_as_one(pair, name, order, is_causal, dtype):
    q, k, v, g = two.operands(dtype, SHAPES[name])
    for x in (q, k, v):
        x.requires_grad_()
    output = attention(*(x.double() for x in (q, k, v)), is_causal=is_causal, backend="reference")
    expected = [output.detach(), *torch.autograd.grad(output, (q, k, v), g.double())]
    both = pair.run(two.ring, order, is_causal, dtype, SHAPES[name], 16)
    for rank, found in enumerate(both):
        where = slice_positions(q.shape[2], 2, rank, order)
        for i, (mine, all_of_it) in enumerate(zip(found, expected, strict=True)):
            assert mine.dtype == dtype
            assert_close(mine, all_of_it[:, :, where], gradient=i > 0)


def test_a_ring_of_one_is_tiled_attention(pair):
    group = dist.new_group([0], use_local_synchronization=True)
    q, k, v, g = two.operands(torch.float64, SHAPES["grouped"])
    found = []
    for attend in (
        lambda *x: ring_attention(*x, group=group, is_causal=True),
        lambda *x: tiled_attention(*x, is_causal=True),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attend(*leaves)
        found.append([output, *torch.autograd.grad(output, leaves, g)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", two.VARIANTS)
def test_logits_are_those_of_the_whole_sequence(pair, name, order):
    expected = two.fresh(name)(two.batches()[0][0])
    for rank, found in enumerate(pair.run(two.logits, name, order)):
        assert torch.allclose(found, expected[:, slice_positions(16, 2, rank, order)], atol=1e-12)


def test_the_layers_keep_their_names_and_weights(pair):
    model = Decoder(two.VARIANTS["llama"])
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    wrapped = ContextParallel(model.eval())
    assert {name: value.data_ptr() for name, value in wrapped.module.named_parameters()} == before
    assert not wrapped.module.blocks[0].attention.training


LAYER = MultiHeadAttention(4, 2)
X = torch.zeros(1, 4, 4)
HEADS = torch.zeros(1, 2, 4, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: slice_positions(6, 2, 0, "zigzag"),
            "L: expected a multiple of 4, for order 'zigzag' on 2 processes, got 6",
        ),
        (lambda: slice_positions(5, 2, 0, "striped"), "L: expected a multiple of 2, …, got 5"),
        (lambda: slice_positions(8, 2, 2), "rank: expected an integer below size = 2, got 2"),
        (lambda: slice_positions(8, 2, 0, "random"), "order: expected one of …, got 'random'"),
        (lambda: ring_attention(HEADS, HEADS, HEADS, order="x"), "order: expected one of …, got 'x'"),
        (
            lambda: ring_attention(HEADS[:, :, :3], HEADS, HEADS),
            "key: expected S = 3 positions, those of query, got float32 tensor of shape (1, 2, 4, 2)",
        ),
        (
            lambda: ring_attention(*(HEADS[:, :, :3],) * 3, is_causal=True),
            "query: expected an even number of positions, for order 'zigzag', got float32 tensor of shape (1, 2, 3, 2)",
        ),
        (lambda: ring_attention(HEADS * torch.nan, HEADS, HEADS), "query: expected no NaN, got 16 NaN of 16 elements"),
        (
            lambda: RingSelfAttention(MultiHeadAttention(4, 2, dropout=0.5)),
            "layer: expected dropout = 0 of the weights, got 0.5",
        ),
        (
            lambda: RingSelfAttention(MultiHeadAttention(4, 2, normalizer="sparsemax")),
            "layer: expected the normalizer 'softmax', got 'sparsemax'",
        ),
        (lambda: RingSelfAttention(LAYER)(X, X), "key: expected None, on a ring, got float32 tensor …"),
        (lambda: RingSelfAttention(LAYER)(X, need_weights=True), "need_weights: expected False, on a ring, got True"),
        (lambda: ContextParallel(LAYER), "model: expected a Decoder, got MultiHeadAttention"),
        (
            lambda: ContextParallel(Decoder(DecoderConfig(**two.SMALL)))(tokens(1, 10, high=11)),
            "tokens: expected at most 8 positions a process, got 10",
        ),
    ],
)
def test_bad_arguments_are_named(pair, call, text):
    with complains(text):
        call()
