"""Measure one program's peak memory: ``python -m attnbook.bench.memory MODULE:FUNCTION LENGTH SETTINGS THREADS``."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from importlib import import_module
from pathlib import Path

import torch

from attnbook.provenance import peak_memory


def _status(field: str) -> int:
    """Return a size from the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def growth(maker: str, length: int, settings: dict, threads: int) -> int:
    """Return by how many bytes the resident set grows at most while a program runs, beyond its inputs.

    Args:
        maker: "module:function".
        length: its first argument.
        settings: the others.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    module, _, name = maker.partition(":")
    make = getattr(import_module(module), name)
    make(length=64, **settings)()
    work = make(length=length, **settings)
    gc.collect()
    before = _status("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is what is held now
    work()
    return max(_status("VmHWM") if Path("/proc/self/status").exists() else peak_memory() or 0, before) - before


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])))
