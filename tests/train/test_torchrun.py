"""Programs under torchrun: the same as alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import two_processes as two
from helpers import ROOT

FOUR = """
import json
import two_processes as two
from attnbook.train.parallel import average, divide, make_mesh, process_group, take_part
found = []
with process_group() as place:
    for tensor, context in (2, 1), (1, 2), (2, 2):
        mesh = make_mesh(tensor=tensor, context=context)
        model = divide(two.fresh("llama"), mesh)
        found.append(two.train(model, lambda batch: take_part(batch, mesh), average)["losses"])
    if place.rank == 0:
        print(json.dumps([place.size, found]))
"""


def program(text, path, *arguments, processes=1):
    """Run a program, under torchrun where there are to be several of it, and return what it prints."""
    path.write_text(text, encoding="utf-8")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), str(path), *arguments]
    env = two.environment(ROOT)
    result = subprocess.run(command, env=env, cwd=path.parent, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_four_processes_under_torchrun_divide_in_two_ways_at_once(tmp_path):
    size, curves = json.loads(program(FOUR, tmp_path / "four.py", processes=4))
    assert size == 4
    assert len(curves) == 3
    expected = two.alone("llama")["losses"]
    for losses in curves:
        assert losses == pytest.approx(expected, abs=1e-9)


def test_the_program_of_the_page_runs(tmp_path):
    page = (ROOT / "book" / "training.md").read_text(encoding="utf-8")
    text = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    lines = program(
        text, tmp_path / "train_gpt.py", "text.txt", "--steps", "3", "--width", "32", "--length", "16"
    ).splitlines()
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 3
    assert losses[2] < losses[0] < 6  # ln 256 = 5.5
    assert (tmp_path / "checkpoint-3" / "manifest.json").exists()
