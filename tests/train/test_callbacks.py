"""Metrics in files, progress on the terminal."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest

from attnbook.train import JSONLines, Progress, Record, TensorBoard
from helpers import complains


def records(*steps, evaluation=None):
    return [Record(step, 2.0 / step, 0.1, None, 64, 0.5 * step, evaluation) for step in steps]


def test_metrics_are_one_object_a_line_and_can_be_read_at_once(tmp_path):
    metrics = JSONLines(tmp_path / "a" / "metrics.jsonl")
    metrics.start(0, 3)
    for n, record in enumerate(records(1, 2), 1):
        metrics.record(record)
        assert len(metrics.path.read_text().splitlines()) == n  # a kill loses nothing
    metrics.record(records(3, evaluation={"loss": 1.5})[0])
    metrics.stop()
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": 2.0, "learning_rate": 0.1, "tokens": 64, "seconds": 0.5}
    assert lines[2]["evaluation"] == {"loss": 1.5}


def test_a_run_that_resumes_takes_back_the_lines_of_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JSONLines(path)
    first.start(0, 9)
    for record in records(1, 2, 3, 4):
        first.record(record)
    first.stop()
    path.write_text(path.read_text() + '{"step": 5, "lo')
    second = JSONLines(path)
    second.start(2, 9)
    second.record(records(3)[0])
    second.stop()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    fresh = JSONLines(path)
    fresh.start(0, 9)
    fresh.stop()
    assert path.read_text() == ""


def test_lines_may_be_rarer_and_evaluations_always_come(tmp_path):
    metrics = JSONLines(tmp_path / "metrics.jsonl", every=3)
    metrics.start(0, 9)
    for record in [*records(1, 2, 3), *records(4, evaluation=1.0), *records(5, 6)]:
        metrics.record(record)
    metrics.stop()
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [3, 4, 6]
    with complains("every: expected an integer ≥ 1, got 0"):
        JSONLines(tmp_path / "x", every=0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(file, **options):
    progress = Progress(file=file, **options)
    progress.start(0, 3)
    for record in records(1, 2, 3):
        progress.record(record)
    progress.stop()
    return file.getvalue()


def test_progress_shows_loss_speed_and_share_of_the_peak(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(Terminal())
    assert "3/3" in text
    assert "loss 0.6667 · 128 tokens/s" in text
    assert "of peak" not in text
    assert "loss 0.6667 · 128 tokens/s · 25.6% of peak" in shown(Terminal(), flops=1e6, peak=5e8)


def test_progress_is_quiet_in_ci_and_where_there_is_no_terminal(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert shown(io.StringIO()) == ""
    monkeypatch.setenv("CI", "true")
    assert shown(Terminal()) == ""
    assert shown(Terminal(), show=True) != ""


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_a_tensorboard_that_is_not_there_is_named(tmp_path):
    with complains("tensorboard: expected False, or the package installed, got no package tensorboard"):
        TensorBoard(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_gets_the_numbers(tmp_path):
    board = TensorBoard(tmp_path)
    board.record(records(1, evaluation=2.0)[0])
    board.stop()
    assert list(tmp_path.glob("events*"))
