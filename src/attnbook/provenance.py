"""Where a result comes from: commit, versions, device, seeds, time and memory."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

COLOPHON = "application/vnd.attnbook.colophon+json"
PACKAGES = ("attnbook", "torch", "numpy", "scipy", "matplotlib", "accelerate")


def seed(value: int = 0) -> None:
    """Seed Python, NumPy and PyTorch, where each is loaded or loadable.

    Args:
        value: the seed, ≥ 0.
    """
    import numpy
    import torch

    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def peak_memory() -> int | None:
    """Return the process's peak resident memory in bytes, or None where the platform does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str = "cpu") -> str:
    """Name the processor, or the accelerator, that a result was computed on.

    Args:
        device: "cpu", "cuda" or "cuda:1".
    """
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text()
        return next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the working tree, with "+" where files differ from it, or "unknown" outside a checkout."""
    try:
        root = Path(__file__).parent
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--porcelain", "--", ":/src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(*, device: str = "cpu", **facts: Any) -> dict[str, Any]:
    """Describe how a stored result was made.

    Args:
        device: where it was computed.
        facts: whatever else makes it reproducible: seeds, settings, seconds.
    Returns:
        A dictionary that JSON can hold.
    """
    import torch

    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **facts,
    }


def stored(name: str, *, folder: Path | str | None = None) -> dict[str, Any] | None:
    """Read stored results, or return None where nobody has measured them yet.

    Args:
        name: the experiment's name.
        folder: where results are kept; by default the checkout's ``results/``.
    Returns:
        What :func:`attnbook.experiments.run_grid` wrote: ``{"runs": [{"settings": …, "outcome": …, "provenance": …},
        …]}``.
    """
    folder = Path(folder) if folder is not None else Path(__file__).resolve().parents[2] / "results"
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def store(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write stored results, one run a line, so that a change of one run is a change of one line.

    Args:
        path: the file; it appears, or changes, all at once.
        runs: as :func:`stored` returns them.
    """
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text('{"runs": [\n' + lines + "\n]}\n", encoding="utf-8")
    partial.replace(path)


class Colophon:
    """What a chapter took: processor time, elapsed time and peak memory, shown at its end.

    The clock starts when the process does, so the figures cover imports too.
    """

    def __init__(self) -> None:
        self.record = {
            "cpu_seconds": round(time.process_time(), 1),
            "peak_mib": round(peak / 2**20) if (peak := peak_memory()) else None,
            "device": device_name(),
            "versions": versions(),
        }

    def __repr__(self) -> str:
        memory = f", {self.record['peak_mib']} MiB at the peak" if self.record["peak_mib"] else ""
        packages = ", ".join(f"{name} {version}" for name, version in self.record["versions"].items())
        return f"{self.record['cpu_seconds']:.0f} s of processor time{memory}, on {self.record['device']}; {packages}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), COLOPHON: self.record}


def colophon() -> Colophon:
    """Return what this process took so far; the last line of every chapter."""
    return Colophon()
