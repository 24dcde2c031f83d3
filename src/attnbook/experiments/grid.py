"""A grid of runs, stored as they finish."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbook.provenance import provenance, store, stored
from attnbook.shapes import mismatch

Settings = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Attributes:
        name: of the results file.
        cells: the settings of every run, seed included.
        measure: turns settings into an outcome that JSON can hold.
    """

    name: str
    cells: list[Settings]
    measure: Callable[..., Any]


def run_grid(
    experiment: Experiment,
    *,
    folder: Path | str = "results",
    only: Settings | None = None,
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> Path:
    """Run the cells that are not stored yet, one after another, and store each as it finishes.

    Args:
        experiment: what to run.
        folder: where results are kept.
        only: run only the cells that have these settings.
        device: "cpu" or "cuda"; results of each are kept apart.
        report: told of each run.
    Returns:
        The results file.
    Raises:
        ValueError: ``only`` fits no cell.
    """
    name = experiment.name if device == "cpu" else f"{experiment.name}-{device}"
    chosen = [cell for cell in experiment.cells if all(cell.get(k) == v for k, v in (only or {}).items())]
    if not chosen:
        raise mismatch("only", f"settings of a run of {experiment.name}", f"{only}")
    path = Path(folder) / f"{name}.json"
    for number, cell in enumerate(chosen, 1):
        runs = (stored(name, folder=folder) or {"runs": []})["runs"]
        if any(run["settings"] == cell for run in runs):
            continue
        report(f"{name} {number}/{len(chosen)}: {cell}")
        started = time.process_time()
        outcome = experiment.measure(**cell)
        seconds = round(time.process_time() - started, 1)
        # Another process may have stored runs meanwhile: read again before writing.
        runs = (stored(name, folder=folder) or {"runs": []})["runs"]
        runs.append(
            {"settings": cell, "outcome": outcome, "provenance": provenance(device=device, cpu_seconds=seconds)}
        )
        order = {json.dumps(c, sort_keys=True): i for i, c in enumerate(experiment.cells)}
        runs.sort(key=lambda run: order.get(json.dumps(run["settings"], sort_keys=True), len(order)))
        store(path, runs)
        report(f"  {seconds} s")
    return path


def outcomes(name: str, **settings: Any) -> Iterator[Any]:
    """Yield the stored outcomes of an experiment whose settings include these.

    Args:
        name: of the results file; one that does not exist yields nothing.
        settings: what to look for.
    """
    for run in (stored(name) or {"runs": []})["runs"]:
        if all(run["settings"].get(key) == value for key, value in settings.items()):
            yield run["outcome"]
