"""Sharded checkpoints: written by some processes, read by others, whole or not there."""

from __future__ import annotations

import json
import pickletools
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import two_processes as two
from attnbook.models import Decoder
from attnbook.train.sharded import MANIFEST, load_sharded, read_manifest, save_sharded
from helpers import complains


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = two.Pair(str(tmp_path_factory.mktemp("pair") / "store"))
    yield pair
    pair.close()


def test_a_process_that_knows_of_no_others_saves_and_loads(tmp_path):  # first: before there is a group
    assert not dist.is_initialized()
    model, _, _, optimizer = two.on_one("alone", "llama")
    two.step(model, optimizer, two.batches()[0])
    assert save_sharded(tmp_path / "a", model, optimizer) == tmp_path / "a"
    other, _, _, fresh = two.on_one("alone", "llama", 5)
    assert load_sharded(tmp_path / "a", other, fresh) is None
    assert two.step(other, fresh, two.batches()[1])[0] == two.step(model, optimizer, two.batches()[1])[0]


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """Return what each kind of training saved midway, and the losses of the steps after."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {kind: pair.run(two.save_midway, kind, "gpt2", str(root / kind))[0] for kind in ("ddp", "fsdp2", "tensor")}
    return root, found


@pytest.mark.parametrize("written", ["ddp", "fsdp2", "tensor"])
@pytest.mark.parametrize("read", ["ddp", "fsdp2", "tensor", "ring", "ring+fsdp2"])
def test_what_one_division_wrote_another_reads(pair, saved, written, read):
    root, after = saved
    for losses in pair.run(two.resume, read, "gpt2", str(root / written)):
        assert losses == pytest.approx(after[written], abs=1e-9)


@pytest.mark.parametrize("written", ["ddp", "fsdp2", "tensor"])
def test_one_process_reads_what_two_wrote(pair, saved, written):
    root, after = saved
    assert two.resume("alone", "gpt2", str(root / written), True) == pytest.approx(after[written], abs=1e-9)


def test_two_processes_read_what_one_wrote(pair, tmp_path):
    model, _, _, optimizer = two.on_one("alone", "llama")
    for batch in two.batches()[:3]:
        two.step(model, optimizer, batch)
    group = dist.new_group([0], use_local_synchronization=True)
    save_sharded(tmp_path / "one", model, optimizer, extra={"step": 3}, group=group)
    after = [two.step(model, optimizer, batch)[0].item() for batch in two.batches()[3:]]
    for losses in pair.run(two.resume, "fsdp2", "llama", str(tmp_path / "one")):
        assert losses == pytest.approx(after, abs=1e-9)


def test_the_state_comes_back_to_the_bit(pair, tmp_path):
    group = dist.new_group([0], use_local_synchronization=True)
    model, _, _, optimizer = two.on_one("alone", "gpt2")
    two.step(model, optimizer, two.batches()[0])
    save_sharded(tmp_path / "a", model, optimizer, group=group)
    other, _, _, fresh = two.on_one("alone", "gpt2", 5)
    load_sharded(tmp_path / "a", other, fresh, group=group)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.equal(q)
        assert optimizer.state[p].keys() == fresh.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[p].items():
            assert value.equal(fresh.state[q][key])
            assert value.dtype == fresh.state[q][key].dtype
    assert other.output.weight is other.embedding.weight
    for mine, theirs in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


def test_nothing_in_it_is_a_pickle(saved):
    files = list((saved[0] / "fsdp2").iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        with pytest.raises(ValueError, match=r"opcode|pickle|STOP"):
            list(pickletools.genops(path.read_bytes()))


def test_each_process_wrote_its_part(saved):
    sizes = [path.stat().st_size for path in (saved[0] / "fsdp2").glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * sum(sizes)
    assert not list(saved[0].glob(".*"))


def test_a_full_disk_on_one_process_leaves_nothing(pair, tmp_path):
    for text in pair.run(two.save_on_full_disk, str(tmp_path / "x")):
        assert "No space left on device" in text
    assert not (tmp_path / "x").exists()
    pair.run(two.save, str(tmp_path / "x"))  # what is left of it does not disturb
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def damage(root: Path, how: str) -> Path:
    """Copy a checkpoint and damage the copy."""
    target = root / how
    shutil.copytree(root / "fsdp2", target)
    file = sorted(target.glob("*.safetensors"))[1]
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif how == "missing":
        file.unlink()
    elif how == "foreign":
        (target / MANIFEST).write_text('{"format": "another"}')
    elif how == "no manifest":
        (target / MANIFEST).unlink()
    elif how == "half a manifest":
        text = (target / MANIFEST).read_text()
        (target / MANIFEST).write_text(text[: len(text) // 2])
    return target


DAMAGE = {
    "truncated": "path: expected files with the checksums that were written, got a damaged …",
    "flipped": "path: expected files with the checksums that were written, got a damaged …",
    "missing": "path: expected the files […], got […] in …",
    "foreign": "path: expected a checkpoint in the format attnbook-sharded-1, got …foreign",
    "no manifest": "path: expected a checkpoint in the format attnbook-sharded-1, got …",
    "half a manifest": "path: expected a checkpoint in the format attnbook-sharded-1, got …",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_all(pair, saved, how):
    path = damage(saved[0], how)
    with complains(DAMAGE[how]):
        pair.run(two.load, str(path), "fsdp2", "gpt2")


def test_a_checkpoint_of_another_model_is_refused(pair, saved, tmp_path):
    path = saved[0] / "fsdp2"
    with complains("model.output.weight: expected float64 tensor of shape (11, 16) in …, got none of that name"):
        pair.run(two.load, str(path), "fsdp2", "bare")
    with complains("model.position: expected float32 tensor of shape (16, 16) in …, got float64 tensor of …"):
        load_sharded_alone(path, two.fresh("gpt2").float())
    smaller = Decoder(two.DecoderConfig(**{**two.SMALL, "depth": 1})).double()
    with complains("model: expected the tensors of …, got one without model.blocks.1.…"):
        load_sharded_alone(path, smaller)
    pair.run(two.save, str(tmp_path / "bare"))
    with complains("path: expected a checkpoint with an optimiser, got …bare, which has none"):
        pair.run(two.load, str(tmp_path / "bare"), "fsdp2", "gpt2")


def load_sharded_alone(path, model):
    before = [p.clone() for p in model.parameters()]
    try:
        load_sharded(path, model, group=dist.new_group([0], use_local_synchronization=True))
    finally:
        assert all(p.equal(q) for p, q in zip(before, model.parameters(), strict=True))


def test_a_taken_name_and_a_strange_extra_are_refused(pair, saved, tmp_path):
    with complains("path: expected a name that is not taken, got …fsdp2"):
        pair.run(two.save, str(saved[0] / "fsdp2"))
    with complains("extra: expected what JSON can hold, got …"):
        pair.run(two.save, str(tmp_path / "x"), torch.zeros(1))
    assert not list(tmp_path.iterdir())
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with complains("optimizer: expected parameters of the model only, got another"):
        save_sharded(tmp_path / "x", two.fresh("gpt2"), other)


def test_the_manifest_tells_what_is_inside(saved):
    manifest = read_manifest(saved[0] / "tensor")
    assert manifest["extra"] == {"step": 3}
    assert manifest["tensors"]["model.embedding.weight"] == ["float64", [11, 16]]
    assert "model.output.weight" not in manifest["tensors"]  # tied: once
    assert manifest["scalars"]["embedding.weight.step"] == 3
    assert manifest["options"]["norm.weight"]["lr"] == 3e-3
    json.dumps(manifest)
