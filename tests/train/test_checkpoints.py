"""Checkpoints: what they hold, what is refused, and that no kill and no full disk does harm."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from attnbook.models import Decoder, DecoderConfig
from attnbook.train import EMA, CheckpointError, Checkpoints, CheckpointWarning, NonFiniteLoss, Windows, fit, token_loss
from attnbook.train import checkpoints as module
from attnbook.train.__main__ import main
from attnbook.train.checkpoints import load_tensors, model_tensors, random_state, set_random_state
from helpers import complains, tokens

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}


def filled(folder, steps=(1, 2, 3), **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, {"weight": WEIGHTS["weight"] + step}, {"losses": torch.ones(step), "note": f"at {step}"})
    return checkpoints


def test_what_is_saved_is_read_bit_for_bit(tmp_path):
    state = {
        "rate": 0.1,
        "huge": 10**30,
        "nan": math.nan,
        "groups": [{"betas": (0.9, 0.95), "fused": True, "foreach": None}],
        "state": {0: {"step": torch.tensor(3.0), "average": torch.randn(3, 2, dtype=torch.float64)}},
        "half": torch.randn(4).bfloat16(),
        "empty": {},
    }
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    assert checkpoints.load() is None
    path = checkpoints.save(7, WEIGHTS, state)
    assert path == tmp_path / "a" / "b" / "step-00000007"
    found = checkpoints.load()
    assert (found.step, found.path) == (7, path)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in WEIGHTS.items())
    assert found.state.keys() == state.keys()
    assert (found.state["rate"], found.state["huge"], found.state["groups"]) == (0.1, 10**30, state["groups"])
    assert math.isnan(found.state["nan"])
    assert found.state["empty"] == {}
    assert torch.equal(found.state["half"], state["half"])
    for name, tensor in state["state"][0].items():
        assert torch.equal(found.state["state"][0][name], tensor)
        assert found.state["state"][0][name].dtype == tensor.dtype


def test_the_newest_few_are_kept(tmp_path):
    checkpoints = filled(tmp_path, range(1, 6), keep=2)
    assert checkpoints.steps() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    assert checkpoints.load().state["note"] == "at 5"


def test_the_sums_are_those_that_sha256sum_checks(tmp_path):
    path = filled(tmp_path, [1]).path(1)
    lines = dict(reversed(line.split("  ")) for line in (path / "SHA256SUMS").read_text().splitlines())
    assert sorted(lines) == ["state.json", "state.safetensors", "weights.safetensors"]
    assert {path.name for path in path.iterdir()} == {*lines, "SHA256SUMS"}
    for name, digest in lines.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


FILES = ("weights.safetensors", "state.safetensors", "state.json", "SHA256SUMS")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "changed", "missing", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(tmp_path, name, damage):
    checkpoints = filled(tmp_path)
    path = checkpoints.path(3) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        foreign = pickle.dumps({"weight": [1.0]})
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "changed": changed, "foreign": foreign}[damage])
    with pytest.warns(CheckpointWarning, match=r"step-00000003.*; it is left out$") as warned:
        found = checkpoints.load()
    assert found.step == 2
    assert torch.equal(found.weights["weight"], WEIGHTS["weight"] + 2)
    if name != "SHA256SUMS" or damage == "missing":
        assert str(path) in str(warned[0].message) or damage == "changed"


def resummed(path):
    """Make the sums right again, as someone would who wrote the files by other means."""
    names = FILES[:3]
    lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (path / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("weights.safetensors", pickle.dumps({}), "…step-00000003: not a checkpoint (…"),
        ("state.safetensors", b"", "…step-00000003: not a checkpoint (…"),
        ("state.json", b"{}", "…state.json: expected 'attnbook checkpoint 1' of step 3, got another"),
        ("state.json", b"[]", "…state.json: expected 'attnbook checkpoint 1' of step 3, got another"),
        ("state.json", b"{", "…step-00000003: not a checkpoint (…"),
    ],
)
def test_files_of_another_kind_are_refused_even_with_right_sums(tmp_path, name, content, text):
    checkpoints = filled(tmp_path)
    (checkpoints.path(3) / name).write_bytes(content)
    resummed(checkpoints.path(3))
    with complains(text, CheckpointError):
        checkpoints.read(3)


def test_a_checkpoint_moved_to_another_step_is_refused(tmp_path):
    checkpoints = filled(tmp_path, [3])
    checkpoints.path(3).rename(checkpoints.path(9))
    with complains("…state.json: expected 'attnbook checkpoint 1' of step 9, got another", CheckpointError):
        checkpoints.read(9)


def test_reading_runs_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    checkpoints = filled(tmp_path / "run")
    for name in FILES[:3]:
        (checkpoints.path(3) / name).write_bytes(pickle.dumps(Harmful()))
    resummed(checkpoints.path(3))
    with pytest.warns(CheckpointWarning):
        assert checkpoints.load().step == 2
    assert not (tmp_path / "harm").exists()


def test_where_none_is_good_the_run_does_not_begin_anew(tmp_path):
    checkpoints = filled(tmp_path, [1, 2])
    for step in (1, 2):
        (checkpoints.path(step) / "state.json").unlink()
    text = (
        f"{tmp_path}: no checkpoint is good: …step-00000002/state.json: cannot be read (No such file or directory); …"
    )
    with pytest.warns(CheckpointWarning), complains(text, CheckpointError):
        checkpoints.load()


def test_another_configuration_is_refused(tmp_path):
    filled(tmp_path, [1], digest="a" * 64)
    with complains("…step-00000001: of another configuration (digest aaaaaaaaaaaa)", CheckpointError):
        Checkpoints(tmp_path, digest="b" * 64).read(1)


def test_a_refused_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    checkpoints = filled(tmp_path)
    (checkpoints.path(3) / "state.json").write_text("")
    filled(tmp_path, [3])
    assert checkpoints.load().step == 3


def test_what_cannot_be_stored_is_named(tmp_path):
    text = "state.a.1: expected numbers, strings, tensors, and lists, tuples and dictionaries of them, got object"
    with complains(text):
        Checkpoints(tmp_path).save(1, WEIGHTS, {"a": [1, object()]})
    assert list(tmp_path.iterdir()) == []
    with complains("keep: expected an integer ≥ 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_tied_weights_are_stored_once_and_come_back_tied():
    config = DecoderConfig(11, 8, 16, 1, 2)
    first, second = Decoder(config), Decoder(config)
    weights = {name: tensor.clone() for name, tensor in model_tensors(first).items()}
    assert "output.weight" not in weights
    load_tensors(second, weights)
    assert second.output.weight is second.embedding.weight
    text = tokens(2, 8, high=11)
    assert torch.equal(first(text), second(text))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (nn.Linear(2, 3), "weights: expected those of this model, got those of another, which has in addition 'bias'"),
        (nn.Sequential(nn.Linear(2, 3)), "weights: expected …, got those of another, which has in addition '0.bias'"),
        (
            nn.Linear(3, 3, bias=False),
            "weights['weight']: expected float32 tensor of shape (3, 2), got float32 tensor of shape (3, 3)",
        ),
        (nn.Linear(2, 3, bias=False).double(), "weights['weight']: expected …, got float64 tensor of shape (3, 2)"),
    ],
)
def test_weights_of_another_model_are_named_and_nothing_changes(other, text):
    model = nn.Linear(2, 3, bias=False)
    before = model.weight.clone()
    with complains(text):
        load_tensors(model, model_tensors(other))
    assert torch.equal(model.weight, before)


def test_all_generators_are_put_back():
    state = random_state()
    draw = lambda: (random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.randn(()).item())  # noqa: E731
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


# --- a run that resumes ---------------------------------------------------------------------------------------------


def decoder() -> Decoder:
    torch.manual_seed(3)
    return Decoder(DecoderConfig(11, 8, 16, 1, 2, dropout=0.2))


class Stop(Exception):
    """Somebody stopped the run."""


def train(folder, *, stop=None, steps=12, precision="no", every=4, model=None, loss=token_loss):
    model = decoder() if model is None else model
    ema = EMA(model, 0.9)

    def progress(step, _):
        if step == stop:
            raise Stop

    history = fit(
        model,
        loss,
        Windows(tokens(200, high=11), 4, 8, seed=5),
        steps=steps,
        learning_rate=1e-2,
        schedule="cosine",
        clip=1.0,
        accumulate=2,
        precision=precision,
        ema=ema,
        evaluate=lambda m: torch.rand(()).item() + m.norm.weight.sum().item(),
        evaluate_every=3,
        checkpoints=None if folder is None else Checkpoints(folder),
        save_every=every,
        progress=progress,
    )
    return history, model_tensors(model), ema


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("stop", [3, 4, 9, 12])
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, precision, stop):
    history, weights, ema = train(None, precision=precision)
    with pytest.raises(Stop):
        train(tmp_path, stop=stop, precision=precision)
    assert Checkpoints(tmp_path).steps() == [step for step in (4, 8, 12) if step < stop]
    torch.manual_seed(99)
    resumed, found, average = train(tmp_path, precision=precision)
    assert resumed.losses == history.losses
    assert resumed.evaluations == history.evaluations
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(average.average[name], tensor) for name, tensor in ema.average.items())
    again, found, _ = train(tmp_path, precision=precision)  # it is over: nothing more is done
    assert again.losses == history.losses
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_batches_without_random_access_are_drawn_again(tmp_path):
    def run(folder, stop=None):
        torch.manual_seed(0)
        model, generator = nn.Linear(2, 1), torch.Generator().manual_seed(1)
        batches = iter(lambda: torch.randn(4, 2, generator=generator), None)

        def progress(step, _):
            if step == stop:
                raise Stop

        options = {"checkpoints": folder and Checkpoints(folder), "save_every": 2, "progress": progress}
        fit(model, lambda m, b: m(b).square().mean(), batches, steps=7, **options)
        return model.weight.detach()

    expected = run(None)
    with pytest.raises(Stop):
        run(tmp_path, stop=5)
    assert torch.equal(run(tmp_path), expected)


def test_a_checkpoint_of_another_model_is_named_and_the_model_stays(tmp_path):
    train(tmp_path, steps=4)
    model = Decoder(DecoderConfig(11, 8, 24, 1, 2))
    before = model.embedding.weight.clone()
    with complains("weights['position']: expected float32 tensor of shape (8, 24), got …"):
        train(tmp_path, model=model)
    assert torch.equal(model.embedding.weight, before)


def test_an_average_cannot_appear_in_the_middle_of_a_run(tmp_path):
    train(tmp_path, steps=4)
    with complains("ema: expected what the run had when it was saved, got None"):
        fit(decoder(), token_loss, [], steps=8, checkpoints=Checkpoints(tmp_path))


def test_a_loss_that_is_not_finite_leaves_the_last_good_step_on_disk(tmp_path):
    calls = []

    def failing(model, batch):
        calls.append(None)
        return token_loss(model, batch) * (math.nan if len(calls) == 13 else 1)  # the first batch of step 6

    model = decoder()
    with pytest.raises(NonFiniteLoss, match=r"^step 6: the loss is nan$"):
        train(tmp_path, model=model, loss=failing)
    found = Checkpoints(tmp_path).load()
    assert found.step == 6
    assert len(found.state["losses"]) == 6
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model_tensors(model).items())


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 100, 2000, 6000])
def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch, room):
    checkpoints = filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    left = [room]

    def write(path, content):
        path.write_bytes(content[: left[0]])
        left[0] -= len(content)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_write", write)
    text = (
        f"{tmp_path}/step-00000004: cannot be written (No space left on device); the last one there is that of step 3"
    )
    with complains(text, CheckpointError):
        checkpoints.save(4, {"weight": torch.zeros(40, 40)}, {"note": torch.zeros(400)})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert checkpoints.load().step == 3
    monkeypatch.undo()
    assert checkpoints.save(4, WEIGHTS, {}).exists()


FULL = """
import sys, torch
from attnbook.train import CheckpointError, Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=100)
for step in range(1, 100):
    try:
        checkpoints.save(step, {"weight": torch.full((64, 64), float(step))}, {"step": step})
    except CheckpointError as error:
        print(error)
        break
found = checkpoints.load()
print(found.step, found.weights["weight"].unique().item(), found.state["step"], step)
print(*sorted(path.name for path in checkpoints.folder.iterdir()))
"""


def test_a_disk_that_is_really_full(tmp_path):
    mount = f'mount -t tmpfs -o size=200k none {tmp_path} && exec "$0" "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    try:
        possible = subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no small disk can be mounted here")
    done = subprocess.run([*inside, sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, found, names = done.stdout.splitlines()
    last = int(found.split()[0])
    assert last >= 2
    assert message.endswith(f"cannot be written (No space left on device); the last one there is that of step {last}")
    assert found == f"{last} {float(last)} {last} {last + 1}"
    assert names.split() == [f"step-{step:08d}" for step in range(1, last + 1)]


# --- kills ----------------------------------------------------------------------------------------------------------

KILLS = 20
RUN = """
folder: {folder}
data: {{name: text, path: {text}}}
model: {{context_length: 8, width: 16, depth: 1, num_heads: 2, dropout: 0.1}}
training: {{steps: 120, batch_size: 4, learning_rate: 1e-2, ema: 0.9, accumulate: 2,
           evaluate_every: 15, save_every: 3, keep: 2}}
"""


def final(folder, digest) -> tuple:
    found = Checkpoints(folder / "checkpoints", digest=digest).read(120)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"], line.get("evaluation")) for line in metrics]
    return found.weights, found.state["ema"]["average"], found.state["optimizer"]["state"], steps


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is Unix's")
def test_a_run_killed_at_twenty_random_points_ends_in_the_same_bits(tmp_path):
    from attnbook.train.config import read, settings

    text = tmp_path / "text.txt"
    text.write_text("".join("abcdefghij \n"[i] for i in tokens(600, high=12).tolist()))

    def config(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RUN.format(folder=tmp_path / name, text=text))
        return str(path)

    context = multiprocessing.get_context("forkserver")
    # Imported once, not twenty times; torch's optimisers import dynamo when they are first used.
    context.set_forkserver_preload(["attnbook.train.run", "safetensors.torch", "torch._dynamo", "yaml"])

    def start(name):
        process = context.Process(target=main, args=([config(name)],))
        process.start()
        return process

    whole = start("whole")
    whole.join(60)
    assert whole.exitcode == 0
    digest = settings(read(config("whole")), vocab_size=12).digest()
    expected = final(tmp_path / "whole", digest)

    chance, runs, kills, writing, where = random.Random(0), 0, 0, 0, []
    while kills < KILLS:
        name = f"run{runs}"
        process = start(name)
        metrics = tmp_path / name / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.is_alive() and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
            time.sleep(0.002)  # until training goes on
        process.join(chance.uniform(0, 0.25))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            where.append(max(Checkpoints(tmp_path / name / "checkpoints").steps(), default=0))
            writing += any((tmp_path / name / "checkpoints").glob(".partial-*"))
        else:  # it came to its end before the kill: compare, and begin another
            assert process.exitcode == 0
            compare(final(tmp_path / name, digest), expected)
            runs += 1
    last = start(name)
    last.join(60)
    assert last.exitcode == 0
    compare(final(tmp_path / name, digest), expected)
    print(f"{kills} kills in {runs + 1} runs, {writing} while a checkpoint was written, after steps {where}")


def compare(found, expected):
    for part, other in zip(found[:2], expected[:2], strict=True):
        assert part.keys() == other.keys()
        assert all(torch.equal(part[name], tensor) for name, tensor in other.items())
    for number, state in expected[2].items():
        assert all(torch.equal(found[2][number][name], tensor) for name, tensor in state.items())
    assert found[3] == expected[3]
