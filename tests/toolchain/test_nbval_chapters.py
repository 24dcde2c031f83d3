"""nbval with our comparison, on small chapters made for the purpose: what passes, and what each failure says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import notebooks

ROOT = Path(__file__).resolve().parents[2]
CLAIM = "from attnbook.claims import claim\nclaim('99-x', 1.0, near=1.0, source='a test', note='one')"


@pytest.fixture
def run(tmp_path):
    """Execute a chapter of the given cells, let a test damage what was committed, and run it under nbval."""

    def run(cells, damage=lambda notebook: None):
        notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
        notebooks.execute(notebook)
        notebook = notebooks.tidy(notebook)
        damage(notebook)
        nbformat.write(notebook, tmp_path / "99-test.ipynb")
        words = [sys.executable, "-m", "pytest", "-c", ROOT / "tools" / "chapters.ini", f"--rootdir={tmp_path}"]
        words += ["-p", "nbval_chapters", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), "CHAPTERS_OUT": str(tmp_path / "out")}
        result = subprocess.run(
            [*words, tmp_path / "99-test.ipynb"], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())["chapters"] if result.stdout else {}
        return result, summary.get("99-test", {}), tmp_path / "out" / "99-test.ipynb"

    return run


def test_a_chapter_that_agrees_passes_is_counted_and_kept(run):
    result, summary, kept = run(["print('loss 0.5')", CLAIM, "1 + 1"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "✓ 99-test" in result.stdout
    assert (summary["passed"], summary["compared"], summary["judged"]) == (True, 2, 1)
    outputs = nbformat.read(kept, 4).cells[1].outputs
    assert any("application/vnd.attnbook.claim+json" in output.get("data", {}) for output in outputs)


def test_a_stale_output_fails_and_names_chapter_cell_and_difference(run):
    def damage(notebook):
        notebook.cells[1].outputs[0].text = "loss 0.9\n"

    result, summary, _ = run(["x = 1", "print('loss 0.5')"], damage)
    assert result.returncode == 1
    assert "✗ 99-test" in result.stdout
    assert "99-test, cell 2 (print('loss 0.5')): Cell outputs differ" in result.stdout
    assert "expected 'loss 0.9'" in result.stdout
    assert "got      'loss 0.5'" in result.stdout
    assert summary["passed"] is False


def test_a_claim_that_fails_fails_the_chapter(run):
    def damage(notebook):
        notebook.cells[0].source = CLAIM.replace("near=1.0", "near=2.0")

    result, _, _ = run([CLAIM], damage)
    assert result.returncode == 1
    assert "ClaimFailed" in result.stdout
    assert "claimed near 2" in result.stdout


def test_a_claim_whose_committed_expectation_was_changed_fails(run):
    def damage(notebook):
        notebook.cells[0].outputs[0].data["application/vnd.attnbook.claim+json"]["expected"] = 3.0

    result, _, _ = run([CLAIM], damage)
    assert result.returncode == 1
    assert "expected: expected 3.0, got 1.0" in result.stdout


def test_a_cell_committed_without_being_executed_is_refused(run):
    def damage(notebook):
        notebook.cells[0].execution_count = None
        notebook.cells[0].outputs = []

    result, _, _ = run(["print(1)"], damage)
    assert result.returncode != 0
    assert "committed without being executed" in result.stdout + result.stderr


def test_outputs_left_out_by_tag_are_counted_as_such(run):
    def damage(notebook):
        notebook.cells[0].metadata["tags"] = ["nbval-ignore-output"]
        notebook.cells[0].outputs[0].text = "another time\n"

    result, summary, _ = run(["import time; print(time.time())"], damage)
    assert result.returncode == 0
    assert (summary["compared"], summary["left_out"]) == (0, 1)
