"""The benchmark command: what it measures, prints, stores, and keeps of what was stored before."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from attnbook import bench
from attnbook.bench import __main__, case, choose, dense
from attnbook.bench.case import Comparison, MemoryComparison, Program


def spin(n: int):
    return lambda: sum(range(n))


def line(suite: str = "dense", setting: str = "small", goal: float | None = 0.5) -> Comparison:
    return Comparison(suite, "summing", setting, spin(2_000), {"slow": spin(60_000), "slower": spin(120_000)}, goal)


def allocate(*, length: int, size: int):
    return lambda: torch.ones(size * length * 2**10)


def memory(mine: int, theirs: int) -> MemoryComparison:
    ours, peer = (Program("test_bench:allocate", 64, {"size": size}) for size in (mine, theirs))
    return MemoryComparison("dense", "allocating", "some", ours, {"peer": peer}, 0.75)


@pytest.fixture
def suites(monkeypatch):
    """Put suites of our own in the place of the real ones."""
    made = {}
    monkeypatch.setattr(__main__, "find_spec", lambda name: made.get(name.rpartition(".")[2]))
    monkeypatch.setattr(__main__, "import_module", lambda name: SimpleNamespace(suite=made[name.rpartition(".")[2]]))
    return made


def test_a_line_is_compared_with_the_fastest_peer():
    found = __main__.measure(line(), rounds=3)
    outcome = found["outcome"]
    assert found["settings"] == {"suite": "dense", "what": "summing", "setting": "small"}
    assert outcome["best"] == "slow"
    assert outcome["met"] is True
    median, low, high = outcome["ratio"]
    assert low <= median <= high < 0.5
    assert set(outcome["seconds"]) == {"attnbook", "slow", "slower"}
    assert __main__.measure(line(goal=1e-9), rounds=1)["outcome"]["met"] is False
    assert __main__.measure(line(goal=None), rounds=1)["outcome"]["met"] is None


def test_memory_is_that_of_a_fresh_process_beyond_its_inputs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{__file__.rpartition('/')[0]}:{case.__file__.rpartition('/attnbook/')[0]}")
    outcome = __main__.measure(memory(100, 200), rounds=1)["outcome"]
    assert outcome["kind"] == "memory"
    assert outcome["mib"]["peer"] == pytest.approx(50, abs=3)  # 64 · 200 · 1024 elements of four bytes
    assert outcome["ratio"][0] == pytest.approx(0.5, abs=0.1)
    assert outcome["met"]


def test_a_new_run_replaces_the_lines_of_its_suite_alone(suites, tmp_path):
    path, said = tmp_path / "bench.json", []
    suites["sparse"] = lambda: iter([line("sparse")])
    suites["dense"] = lambda: iter([line(setting="a"), line(setting="b")])
    for name in ("sparse", "dense"):
        __main__.run_suite(name, rounds=1, path=path, report=said.append)
    suites["dense"] = lambda: iter([line(setting="b"), line(setting="c")])
    __main__.run_suite("dense", rounds=1, path=path, report=said.append)
    runs = json.loads(path.read_text())["runs"]
    assert [(run["settings"]["suite"], run["settings"]["setting"]) for run in runs] == [
        ("dense", "b"),
        ("dense", "c"),
        ("sparse", "small"),
    ]
    for run in runs:
        assert {"commit", "device", "threads", "versions", "rounds", "cpu_seconds"} <= set(run["provenance"])
    assert len(said) == 5
    assert "slow" in said[0]
    assert "0.5" in said[0]


def test_some_lines_can_be_measured_alone(suites, tmp_path):
    path = tmp_path / "bench.json"
    suites["dense"] = lambda: iter([line(setting="short", goal=1.0), line(setting="long", goal=1.0)])
    __main__.run_suite("dense", rounds=1, path=path, report=str)
    suites["dense"] = lambda: iter([line(setting="short", goal=2.0), line(setting="long", goal=2.0)])
    __main__.run_suite("dense", rounds=1, path=path, report=str, only=["lon", "nothing"])
    runs = json.loads(path.read_text())["runs"]
    assert {run["settings"]["setting"]: run["outcome"]["goal"] for run in runs} == {"short": 1.0, "long": 2.0}


def test_an_interrupted_run_keeps_what_it_did_not_come_to(suites, tmp_path):
    path = tmp_path / "bench.json"
    suites["dense"] = lambda: iter([line(setting="a"), line(setting="b")])
    __main__.run_suite("dense", rounds=1, path=path, report=str)

    def stops():
        yield line(setting="a", goal=None)
        raise ImportError("No module named 'peer'")

    said = []
    suites["dense"] = stops
    __main__.run_suite("dense", rounds=1, path=path, report=said.append)
    runs = {run["settings"]["setting"]: run["outcome"] for run in json.loads(path.read_text())["runs"]}
    assert runs["a"]["goal"] is None
    assert runs["b"]["goal"] == 0.5
    assert said[-1].startswith("dense: a package to compare with is missing (No module named 'peer')")
    __main__.run_suite("gpu", rounds=1, path=path, report=said.append)
    assert said[-1] == "gpu: not written yet"


def test_the_command_line(suites, tmp_path, capsys):
    suites["dense"] = lambda: iter([line()])
    threads = torch.get_num_threads()
    __main__.main(["--suite", "dense", "--json", str(tmp_path / "x.json"), "--rounds", "1", "--threads", str(threads)])
    assert "summing" in capsys.readouterr().out
    assert (tmp_path / "x.json").exists()
    with pytest.raises(SystemExit):
        __main__.main(["--suite", "nothing"])


def test_the_dense_suite_compares_equal_things(monkeypatch):
    monkeypatch.setattr(dense, "_compiled_naive", lambda: dense.naive)
    for given in ({"is_causal": True}, {"is_causal": False}):
        outputs = [dense.work(form, length=33, backward=False, **given)() for form in dense.FORMS]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])
    gradients = [dense.work(form, length=33)() for form in dense.FORMS]
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-5)


def test_the_registry_names_the_suites():
    assert "dense" in bench.SUITES


def test_a_row_of_the_table_names_the_quickest_unless_the_kernel_is_about_as_quick(monkeypatch):
    setting = {"dtype": "float32", "gradient": True, "mask": "tensor", "L": 8, "S": 8}
    for times in choose.row(setting, rounds=1)["ms"].values():
        assert set(times) == {"sdpa", "tiled", "stored", "reference"}
    for quickest, take in ((0.98, "sdpa"), (0.9, "stored")):
        times = {"sdpa": [1.0], "stored": [quickest]}
        monkeypatch.setattr(choose, "interleaved", lambda calls, times=times, **rest: times)
        assert choose.row(setting, rounds=1)["take"] == take


def test_what_is_taken_does_well_on_one_thread_and_on_all(monkeypatch):
    measured = {1: {"sdpa": 10.0, "stored": 8.0, "tiled": 9.0}, 2: {"sdpa": 8.0, "stored": 9.6, "tiled": 7.0}}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(choose, "times_of", lambda setting, threads, rounds: measured[threads])
    found = choose.row({"L": 1}, rounds=1)
    assert found == {"L": 1, "take": "tiled", "ms": {"1": measured[1], "2": measured[2]}}


def test_the_tool_replaces_this_processors_part(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    monkeypatch.setattr(choose, "TABLE", path)
    monkeypatch.setattr(choose, "table", lambda: {"other": {"provenance": {}, "rows": [1]}})
    monkeypatch.setattr(choose, "settings", lambda: iter([{"L": 1}, {"L": 2}]))
    monkeypatch.setattr(choose, "row", lambda setting, rounds: {**setting, "take": "sdpa"})
    choose.main(rounds=1)
    found = json.loads(path.read_text())
    assert found["other"]["rows"] == [1]
    assert found[choose.processor()]["rows"] == [{"L": 1, "take": "sdpa"}, {"L": 2, "take": "sdpa"}]
