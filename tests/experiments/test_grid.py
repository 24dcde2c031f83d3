"""Grids of runs: resumed, stored one by one, and chosen from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from attnbook import experiments, provenance
from attnbook.experiments import Experiment, __main__, grid, outcomes, run_grid
from helpers import complains

CELLS = [{"size": size, "seed": seed} for size in (1, 2) for seed in (0, 1)]


class Toy:
    """An experiment that notes its runs and fails where it is told to."""

    def __init__(self, cells=CELLS, fail_at=None):
        self.ran, self.fail_at = [], fail_at
        self.experiment = Experiment("toy", cells, self.measure)

    def measure(self, *, size, seed):
        if self.fail_at == (size, seed):
            raise RuntimeError("out of patience")
        self.ran.append((size, seed))
        return {"value": size * 10 + seed, "word": "Ἐν"}


@pytest.fixture
def silent():
    said = []
    return said


def runs(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def test_every_cell_is_run_and_stored_with_its_provenance(tmp_path, silent):
    toy = Toy()
    path = run_grid(toy.experiment, folder=tmp_path / "new", report=silent.append)
    assert path == tmp_path / "new" / "toy.json"
    assert toy.ran == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [run["settings"] for run in runs(path)] == CELLS
    assert [run["outcome"]["value"] for run in runs(path)] == [10, 11, 20, 21]
    for run in runs(path):
        assert {"commit", "date", "device", "threads", "versions", "cpu_seconds"} <= set(run["provenance"])
    assert silent[0] == "toy 1/4: {'size': 1, 'seed': 0}"
    assert len(silent) == 8


def test_what_is_stored_is_not_repeated(tmp_path, silent):
    run_grid(Toy(CELLS[:3]).experiment, folder=tmp_path, report=silent.append)
    toy = Toy()
    run_grid(toy.experiment, folder=tmp_path, report=silent.append)
    assert toy.ran == [(2, 1)]
    toy.ran.clear()
    run_grid(toy.experiment, folder=tmp_path, report=silent.append)
    assert toy.ran == []


def test_a_failure_keeps_the_runs_before_it(tmp_path, silent):
    with pytest.raises(RuntimeError, match="out of patience"):
        run_grid(Toy(fail_at=(2, 0)).experiment, folder=tmp_path, report=silent.append)
    assert len(runs(tmp_path / "toy.json")) == 2
    toy = Toy()
    run_grid(toy.experiment, folder=tmp_path, report=silent.append)
    assert toy.ran == [(2, 0), (2, 1)]


def test_a_write_that_breaks_off_leaves_the_file_whole(tmp_path, silent, monkeypatch):
    path = run_grid(Toy(CELLS[:1]).experiment, folder=tmp_path, report=silent.append)
    before = path.read_text(encoding="utf-8")
    write = Path.write_text

    def broken(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="disk full"):
        run_grid(Toy().experiment, folder=tmp_path, report=silent.append)
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == before


def test_what_another_process_stored_meanwhile_is_kept(tmp_path, silent):
    toy = Toy(CELLS[:1])
    other = Toy(CELLS[3:])

    def measure(**cell):
        run_grid(other.experiment, folder=tmp_path, report=silent.append)
        return toy.measure(**cell)

    run_grid(Experiment("toy", CELLS[:1], measure), folder=tmp_path, report=silent.append)
    assert [run["settings"] for run in runs(tmp_path / "toy.json")] == [CELLS[0], CELLS[3]]


def test_runs_are_stored_in_the_order_of_the_grid_one_a_line(tmp_path, silent):
    for chosen in (CELLS[2:], CELLS):
        path = run_grid(Toy(chosen).experiment, folder=tmp_path, report=silent.append)
    assert [run["settings"] for run in runs(path)] == CELLS
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    assert "Ἐν" in lines[1]
    assert not list(tmp_path.glob("*.partial"))


def test_only_chooses_cells(tmp_path, silent):
    toy = Toy()
    run_grid(toy.experiment, folder=tmp_path, only={"size": 2}, report=silent.append)
    assert toy.ran == [(2, 0), (2, 1)]
    run_grid(toy.experiment, folder=tmp_path, only={"seed": 0, "size": 1}, report=silent.append)
    assert toy.ran[2:] == [(1, 0)]
    with complains("only: expected settings of a run of toy, got {'size': 3}"):
        run_grid(toy.experiment, folder=tmp_path, only={"size": 3})


def test_devices_are_kept_apart(tmp_path, silent, monkeypatch):
    monkeypatch.setattr(provenance, "device_name", lambda device: device)
    path = run_grid(Toy().experiment, folder=tmp_path, device="cuda", report=silent.append)
    assert path.name == "toy-cuda.json"
    assert runs(path)[0]["provenance"]["device"] == "cuda"
    toy = Toy()
    run_grid(toy.experiment, folder=tmp_path, report=silent.append)
    assert len(toy.ran) == 4


def test_outcomes_are_found_by_their_settings(tmp_path, silent, monkeypatch):
    run_grid(Toy().experiment, folder=tmp_path, report=silent.append)
    monkeypatch.setattr(grid, "stored", lambda name: provenance.stored(name, folder=tmp_path))
    assert [found["value"] for found in outcomes("toy")] == [10, 11, 20, 21]
    assert [found["value"] for found in outcomes("toy", seed=1)] == [11, 21]
    assert list(outcomes("toy", seed=7)) == []
    assert list(outcomes("nothing-of-the-kind")) == []


@pytest.fixture
def command(monkeypatch):
    """Make the toy known to the command line; give a function that runs it."""
    module = ModuleType("attnbook.experiments.toy")
    toy = Toy()
    module.EXPERIMENT = toy.experiment
    monkeypatch.setitem(sys.modules, "attnbook.experiments.toy", module)
    monkeypatch.setitem(experiments.NAMES, "toy", "toy")
    return toy, __main__.main


def test_the_command_line_runs_a_grid(command, tmp_path, capsys):
    toy, main = command
    main(["toy", "--folder", str(tmp_path)])
    assert len(toy.ran) == 4
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "toy.json")


def test_the_command_line_chooses_cells(command, tmp_path):
    toy, main = command
    main(["toy", "size=2", "seed=1", "--folder", str(tmp_path), "--threads", "1"])
    assert toy.ran == [(2, 1)]
    assert __main__._setting("model=gpt") == ("model", "gpt")
    assert __main__._setting('model="gpt"') == ("model", "gpt")
    assert __main__._setting("rate=1e-3") == ("rate", 0.001)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: name"),
        (["unknown"], "argument name: invalid choice: 'unknown'"),
        (["toy", "size"], "expected KEY=VALUE, got 'size'"),
        (["toy", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["toy", "--threads", "many"], "argument --threads: invalid int value: 'many'"),
    ],
)
def test_the_command_line_says_what_is_wrong(command, arguments, text, capsys):
    _, main = command
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert text in capsys.readouterr().err


def test_settings_that_fit_no_cell_are_named(command, tmp_path):
    _, main = command
    with complains("only: expected settings of a run of toy, got {'size': 9}"):
        main(["toy", "size=9", "--folder", str(tmp_path)])
