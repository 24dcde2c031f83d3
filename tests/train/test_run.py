"""The command line: its schema, its errors, and what a run leaves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from attnbook.models import Decoder
from attnbook.train import Checkpoints
from attnbook.train.__main__ import main
from attnbook.train.checkpoints import load_tensors
from attnbook.train.config import nearest, read, settings
from attnbook.train.run import mup_base, run
from helpers import complains, loaded

CONFIG = """
folder: {folder}/run
data: {{name: text, path: {folder}/text.txt}}
model: {{style: llama, context_length: 8, width: 16, depth: 1, num_heads: 2}}
training:
  steps: 30
  batch_size: 4
  learning_rate: 1e-2
  evaluate_every: 10
  save_every: 10
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij\n" * 40)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "config.yaml"


def test_a_run_leaves_its_configuration_its_metrics_and_its_weights(config, tmp_path, capsys):
    main([str(config)])
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "provenance.json",
        "metrics.jsonl",
        "checkpoints",
    }
    record = json.loads((folder / "config.json").read_text())
    assert record["model"]["vocab_size"] == 11
    assert (record["model"]["position"], record["model"]["activation"]) == ("rotary", "swiglu")
    assert record["training"]["learning_rate"] == 0.01  # YAML takes 1e-2 for text
    assert "torch" in json.loads((folder / "provenance.json").read_text())["versions"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 31))
    assert {line["step"] for line in metrics if "evaluation" in line} == {10, 20, 30}
    assert metrics[-1]["loss"] < 1 < metrics[0]["loss"]
    chosen = settings(read(config), vocab_size=11)
    checkpoints = Checkpoints(folder / "checkpoints", digest=chosen.digest())
    assert checkpoints.steps() == [10, 20, 30]
    model = Decoder(chosen.model)
    load_tensors(model, checkpoints.load().weights)
    said = capsys.readouterr()
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters, 396 tokens of text" in said.out
    assert f"step 30, validation loss {metrics[-1]['evaluation']:.4f}" in said.out
    assert said.err == ""
    before = (folder / "metrics.jsonl").read_text()
    main([str(config)])  # it is over already
    assert (folder / "metrics.jsonl").read_text() == before


def test_all_switches_together_train(config):
    switches = ["accumulate=2", "label_smoothing=0.1", "precision=bf16", "recompute=true", "ema=0.9", "mup_width=8"]
    switches += ["schedule=wsd", "warmup=3", "cooldown=6", "clip=0.5", "betas=[0.8, 0.9]", "keep=1"]
    history = run(read(config, [f"training.{switch}" for switch in switches]), report=lambda line: None)
    assert history.losses[-1] < history.losses[0] / 1.5
    assert len(history.evaluations) == 3


def test_tinyshakespeare_needs_no_file(tmp_path):
    loaded("tinyshakespeare")
    content = {
        "folder": str(tmp_path),
        "model": {"context_length": 64, "width": 8, "depth": 1, "num_heads": 1},
        "training": {"steps": 2, "batch_size": 2},
    }
    history = run(content, report=lambda line: None)
    assert history.evaluations[-1][1] == pytest.approx(torch.tensor(65.0).log().item(), abs=0.3)


def test_another_configuration_in_the_same_folder_is_refused(config, tmp_path):
    main([str(config), "training.steps=2"])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with complains("folder: expected an empty one, or one of the same configuration, got one with training.steps = 2"):
        run(read(config))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


ERRORS = {
    "training.learning_rat=1": "training.learning_rat: expected a key of the schema, got an unknown one "
    "(the nearest is training.learning_rate)",
    "modle.depth=1": "modle: expected a key of the schema, got an unknown one (the nearest is model)",
    "model.heads=1": "model.heads: expected a key of the schema, got an unknown one (the nearest is model.num_heads)",
    "batch_size=4": "batch_size: expected a key of the schema, got an unknown one (the nearest is training.batch_size)",
    "model.vocab_size=4": "model.vocab_size: expected no such key: it is the data's, got 4",
    "model.style=bert": "model.style: expected one of 'gpt2', 'llama', got 'bert'",
    "model.width=wide": "model.width: expected an integer, got 'wide'",
    "model.width=16.5": "model.width: expected an integer, got 16.5",
    "model.depth=true": "model.depth: expected an integer, got True",
    "model.depth=0": "model.depth: expected an integer ≥ 1, got 0",
    "model.width=": "model.width: expected an integer, got None",
    "model.num_heads=3": "model.num_heads: expected a divisor of the width, 16, got 3",
    "model.num_kv_heads=3": "model.num_kv_heads: expected a divisor of num_heads = 2, got 3",
    "model.context_length=44": "model.context_length: expected below 44, the data's smaller part, got 44",
    "model=3": "model: expected a section of keys and values, got 3",
    "model.depth.x=3": "model.depth.x: expected depth to be a section, got 1",
    "training.learning_rate=fast": "training.learning_rate: expected a number, got 'fast'",
    "training.learning_rate=-1": "training.learning_rate: expected a number > 0, got -1.0",
    "training.betas=[0.9]": "training.betas: expected a list of 2 numbers, got list",
    "training.betas=[0.9, 1.0]": "training.betas: expected a number in [0, 1), got 1.0",
    "training.clip=tight": "training.clip: expected a number or null, got 'tight'",
    "training.compile=1": "training.compile: expected true or false, got 1",
    "training.schedule=step": "training.schedule: expected one of …, got 'step'",
    "training.warmup=30": "training.warmup: expected fewer than the 30 steps, got 30",
    "training.cooldown=3": "training.cooldown: expected None with schedule 'cosine', got 3",
    "training.precision=int8": "training.precision: expected one of 'no', 'bf16', 'fp16', got 'int8'",
    "training.steps=0": "training.steps: expected an integer ≥ 1, got 0",
    "training.save_every=0": "training.save_every: expected an integer ≥ 1, got 0",
    "training.weight_decay=-1": "training.weight_decay: expected a number ≥ 0, got -1.0",
    "training.ema=1": "training.ema: expected a number in [0, 1), got 1.0",
    "training.mup_width=5": "training.mup_width: expected a width at which num_heads is whole, got 5",
    "data.name=wikipedia": "data.name: expected one of 'tinyshakespeare', 'text', got 'wikipedia'",
    "data.path=": "data.path: expected a file, got None",
    "data.path=nowhere": "data.path: expected a text file, got nowhere (…No such file or directory: 'nowhere')",
    "seed=-1": "seed: expected an integer ≥ 0, got -1",
    "folder=''": "folder: expected a folder's name, got ",
    "device=tpuu": "device: expected the name of a device, got tpuu",
    "nothing": "change: expected key=value, got 'nothing'",
    "seed=[": "seed: expected a YAML value, got '['",
}


@pytest.mark.parametrize(("change", "text"), ERRORS.items(), ids=ERRORS)
def test_errors_name_the_key_and_nothing_is_written(config, tmp_path, change, text):
    with complains(text):
        run(read(config, [change]), report=lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "CONFIG: expected a YAML file, got …missing.yaml (No such file or directory)"),
        ("a: [", "CONFIG: expected a YAML file, got …: while parsing …"),
        ("- 1", "CONFIG: expected keys and values, got …, which holds list"),
        ("folder: x\ntraining: {steps: 1}", "model: expected a value, got none"),
        ("folder: x\nmodel: {width: 8}\ntraining: {steps: 1}", "model.context_length: expected a value, got none"),
    ],
)
def test_bad_files_are_named(tmp_path, content, text):
    path = tmp_path / ("missing.yaml" if content is None else "config.yaml")
    if content is not None:
        path.write_text(content)
    with complains(text):
        settings(read(path))


def test_the_command_line_says_it_in_one_line(config, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(config), "training.stesp=3"])
    assert caught.value.code == 2
    expected = "error: training.stesp: expected a key of the schema, got an unknown one (the nearest is training.steps)"
    assert capsys.readouterr().err == expected + "\n"


def test_the_nearest_key_is_found_with_and_without_its_section():
    assert nearest("trainig.steps") == "training.steps"
    assert nearest("lerning_rate") == "training.learning_rate"
    assert nearest("model.stlye") == "model.style"
    assert nearest("threds") == "threads"


def test_the_folder_and_only_the_folder_is_left_out_of_the_digest(config):
    content = read(config)
    digest = settings(content).digest()
    assert settings({**content, "folder": "elsewhere"}).digest() == digest
    assert settings({**content, "seed": 1}).digest() != digest
    assert settings(read(config, ["training.clip=2"])).digest() != digest


def test_the_base_has_heads_of_the_same_size(config):
    model = settings(read(config, ["model.num_kv_heads=1", "model.hidden=32"])).model
    base = mup_base(replace(model, width=64, num_heads=8, num_kv_heads=4), 16)
    assert (base.width, base.num_heads, base.num_kv_heads, base.hidden) == (16, 2, 1, 8)
