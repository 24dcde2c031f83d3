"""Two processes train as one: data parallel, sharded, tensor parallel, context parallel."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import two_processes as two
from attnbook.layers import TransformerBlock
from attnbook.train.parallel import (
    average,
    clip_gradients,
    make_mesh,
    process_group,
    sharding_plugin,
    take_rows,
)
from helpers import complains


def test_a_process_alone_is_a_group_of_one(monkeypatch):  # first: before there is a group
    monkeypatch.delenv("RANK", raising=False)
    with process_group() as place:
        assert place == (0, 1, torch.device("cpu"))
        assert average(torch.tensor(3.0)) == 3
        assert take_rows(torch.ones(3)).shape == (3,)
    assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    text = "nproc_per_node: expected at most 2, the number of GPUs, got 3"
    with complains(text), process_group():
        pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = two.Pair(str(tmp_path_factory.mktemp("pair") / "store"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def single():
    return {name: two.alone(name) for name in two.VARIANTS}


@pytest.mark.parametrize("name", two.VARIANTS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor", "ring", "ring+fsdp2"])
def test_two_processes_train_as_one(pair, single, kind, name):
    expected = single[name]
    assert expected["losses"][-1] != pytest.approx(expected["losses"][0], abs=0.01)
    for found in pair.run(two.divided, kind, name):
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-9)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-9)
        for what in ("gradients", "weights"):
            assert found[what].keys() == expected[what].keys()
            for key, value in expected[what].items():
                assert (found[what][key] - value).abs().max() < 1e-9, (what, key)


@pytest.mark.parametrize("kind", ["fsdp2", "tensor"])
def test_each_process_holds_its_part(pair, kind):
    whole = sum(p.numel() for p in two.fresh("llama").parameters())
    norms = sum(p.numel() for p in two.fresh("llama").parameters() if p.dim() == 1)
    held = pair.run(two.held, kind, "llama")
    assert sum(held) == (whole if kind == "fsdp2" else whole + norms)  # tensor parallel: norms are whole everywhere
    assert max(held) < 0.6 * whole


@pytest.mark.parametrize("kind", ["fsdp2", "tensor"])
def test_single_precision_stays_near(pair, single, kind):
    for losses in pair.run(two.in_single_precision, kind, "gpt2"):
        assert losses == pytest.approx(single["gpt2"]["losses"], abs=1e-5)


def test_the_number_to_report_is_the_mean(pair):
    assert [x.item() for x in pair.run(two.mean_of_ranks)] == [0.5, 0.5]
    assert all(x.isnan() for x in pair.run(two.mean_with_a_nan))


def test_rows_are_dealt_out(pair):
    x = torch.arange(12).view(6, 2)
    first, second = pair.run(two.rows, x)
    assert torch.cat([first["a"][0], second["a"][0]]).equal(x)
    assert first["a"][1].tolist() == [0, 1, 2]


def test_groups_of_one_kind(pair):
    whole, cut = pair.run(two.kinds)[0]
    assert whole == [15, 5]  # of a plain model both groups stay as they were
    assert cut == [(True, 0.1), (False, 0.1), (True, 0.0), (False, 0.0)]


def test_clipping_is_pytorchs():
    ours = nn.Linear(3, 4)
    ours(torch.ones(2, 3)).square().sum().backward()
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad = p.grad.clone()
    for most in (0.1, 1e6):
        norm = clip_gradients(ours.parameters(), most)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs.parameters(), most).item())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad)
    assert clip_gradients(nn.Linear(1, 1).parameters(), 1.0) == 0


def test_accelerate_is_told_the_same():
    plugin = sharding_plugin(reshard=False)
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is False
    assert plugin.transformer_cls_names_to_wrap == [TransformerBlock.__name__]


def test_an_existing_group_is_left(pair):
    with process_group() as place:
        assert (place.rank, place.size, place.device.type) == (0, 2, "cpu")
    assert dist.is_initialized()


def test_a_mesh_has_three_axes(pair):
    shapes = pair.run(two.mesh_shapes)[0]
    assert shapes == [{"data": 2, "context": 1, "tensor": 1}, {"data": 1, "context": 2, "tensor": 1}]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make_mesh(tensor=3), "tensor × context: expected a divisor of the 2 processes, got 3"),
        (lambda: make_mesh(context=0), "context: expected an integer ≥ 1, got 0"),
        (
            lambda: take_rows(torch.zeros(3, 2)),
            "batch: expected a multiple of 2 rows, one part for each process, got float32 tensor of shape (3, 2)",
        ),
        (lambda: clip_gradients([], 0), "most: expected a number > 0, got 0"),
    ],
)
def test_bad_arguments_are_named(pair, call, text):
    with complains(text):
        call()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_kv_heads": 1}, "num_kv_heads: expected a multiple of the 2 processes that share a matrix, got 1"),
        ({"hidden": 7}, "hidden: expected a multiple of the 2 processes that share a matrix, got 7"),
        ({"dropout": 0.1}, "dropout: expected 0 of the attention weights, got 0.1"),
        (None, "model: expected a Decoder, got Linear"),
    ],
)
def test_what_cannot_be_divided_is_named(pair, changes, text):
    with complains(text):
        pair.run(two.divide, changes)
