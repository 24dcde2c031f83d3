"""Where a result comes from."""

from __future__ import annotations

import builtins
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attnbook import provenance
from helpers import ROOT


def test_seed_seeds_all_three():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    provenance.seed(3)
    first = draw()
    provenance.seed(3)
    assert draw() == first
    provenance.seed(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_versions_are_those_installed():
    found = provenance.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert "attnbook" in found


def test_a_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert set(provenance.versions()) == {"python", "torch"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own record is Linux's")
def test_peak_memory_is_what_the_kernel_says_in_bytes():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert provenance.peak_memory() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_peak_memory_is_unknown_where_the_platform_does_not_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert provenance.peak_memory() is None
    assert provenance.colophon().record["peak_mib"] is None
    assert "MiB" not in repr(provenance.colophon())


def test_device_name(monkeypatch):
    assert provenance.device_name()
    monkeypatch.setattr(Path, "read_text", lambda self: "model name\t: Fast Chip 9000\nflags: x\n")
    assert provenance.device_name() == "Fast Chip 9000"
    monkeypatch.setattr(Path, "read_text", lambda self: "nothing of the kind\n")
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "vax")
    assert provenance.device_name() == "vax"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    assert provenance.device_name("cuda") == "card cuda"


def git(folder, *words):
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(folder), *words],
        check=True,
        capture_output=True,
    )


def test_commit_marks_changed_sources(tmp_path, monkeypatch):
    module = tmp_path / "src" / "attnbook" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(module))
    git(tmp_path, "init", "-q")
    assert provenance.commit() == "unknown"  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = provenance.commit()
    assert len(clean) == 12
    int(clean, 16)
    (module.parent / "other.py").write_text("y = 2\n")
    assert provenance.commit() == clean + "+"


def test_commit_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() == "unknown"


def test_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "unknown"


def test_provenance_can_be_written_as_json():
    found = json.loads(json.dumps(provenance.provenance(seeds=[0, 1], seconds=2.5)))
    assert set(found) == {"commit", "date", "device", "threads", "versions", "seeds", "seconds"}
    assert found["seeds"] == [0, 1]
    assert found["threads"] == torch.get_num_threads()
    assert len(found["date"].split("-")) == 3


def test_stored_reads_results_or_says_none(tmp_path):
    (tmp_path / "toy.json").write_text('{"runs": []}', encoding="utf-8")
    assert provenance.stored("toy", folder=tmp_path) == {"runs": []}
    assert provenance.stored("missing", folder=tmp_path) is None
    assert provenance.stored("no-such-experiment") is None


def test_stored_looks_in_the_checkout(monkeypatch):
    opened = []
    monkeypatch.setattr(Path, "exists", lambda self: opened.append(self) or False)
    provenance.stored("toy")
    assert opened == [ROOT / "results" / "toy.json"]


def test_colophon_shows_what_the_process_took():
    found = provenance.colophon()
    bundle = found._repr_mimebundle_()
    record = bundle[provenance.COLOPHON]
    assert set(record) == {"cpu_seconds", "peak_mib", "device", "versions"}
    assert record["cpu_seconds"] > 0
    assert bundle["text/plain"] == repr(found)
    assert repr(found).startswith(
        f"{record['cpu_seconds']:.0f} s of processor time, {record['peak_mib']} MiB at the peak"
    )
    assert f"torch {torch.__version__}" in repr(found)
    json.dumps(record)


def test_nothing_is_read_from_elsewhere(monkeypatch):
    # device_name falls back where /proc cannot be read.
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    assert provenance.device_name() in (provenance.platform.processor(), provenance.platform.machine())


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match=r"[Ss]eed"):
        provenance.seed(-1)
