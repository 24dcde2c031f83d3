"""Run the benchmarks from the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attnbook.bench import BESIDE_NANOGPT, SUITES
from attnbook.bench.case import Comparison, MemoryComparison, compare, peak_extra
from attnbook.provenance import provenance, store, stored

HEADER = f"{'what':58} {'best peer':18} {'ratio':>7} {'quartiles':>15} {'goal':>7}"


def measure(line: Comparison | MemoryComparison, *, rounds: int) -> dict[str, Any]:
    """Measure one line of the table.

    Args:
        line: what to compare.
        rounds: how often times are taken.
    Returns:
        What is stored of it, without provenance.
    """
    if isinstance(line, Comparison):
        timing = compare(line, rounds=rounds)
        best, found = timing.best, timing.ratio
        kind, unit = "time", {name: float(f"{seconds:.4g}") for name, seconds in timing.seconds.items()}
    else:
        sizes = {"attnbook": peak_extra(line.ours), **{name: peak_extra(peer) for name, peer in line.peers.items()}}
        best = min(line.peers, key=sizes.__getitem__)
        found = [sizes["attnbook"] / max(sizes[best], 1)] * 3
        kind, unit = "memory", {name: round(size / 2**20, 1) for name, size in sizes.items()}
    outcome = {"kind": kind, "best": best, "ratio": [round(x, 4) for x in found]}
    outcome |= {"goal": line.goal, "met": None if line.goal is None else found[0] <= line.goal}
    outcome["seconds" if kind == "time" else "mib"] = unit
    return {"settings": {"suite": line.suite, "what": line.what, "setting": line.setting}, "outcome": outcome}


def shown(run: dict[str, Any]) -> str:
    """Return two lines of the printed table for what is stored of a comparison.

    Args:
        run: as :func:`measure` returns it.
    """
    settings, outcome = run["settings"], run["outcome"]
    median, low, high = outcome["ratio"]
    goal = "–" if outcome["goal"] is None else f"{outcome['goal']:.3g}"
    verdict = {None: "", True: "met", False: "not met"}[outcome["met"]]
    quartiles = f"{low:.3f}–{high:.3f}"
    line = f"{settings['what']:58} {outcome['best']:18} {median:7.3f} {quartiles:>15} {goal:>7} {verdict}"
    return f"{line}\n  {settings['setting']}"


def run_suite(
    name: str,
    *,
    rounds: int,
    path: Path,
    only: Sequence[str] = (),
    nanogpt: Path | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Run one suite, and put its lines in the place of those that the file has.

    Args:
        name: in ``SUITES``.
        rounds: how often times are taken.
        path: the results file.
        only: measure the lines whose setting holds one of these texts, and leave the others as they are stored.
        nanogpt: where nanoGPT's model.py is, for the suites that compare with it.
        report: told of every line; of a suite or a peer package that is missing, in one.
    """
    if find_spec(f"attnbook.bench.{name}") is None:
        report(f"{name}: not written yet")
        return
    made = []
    try:
        for line in _lines(name, nanogpt):
            if only and not any(text in line.setting for text in only):
                continue
            started = time.process_time()
            run = measure(line, rounds=rounds)
            seconds = round(time.process_time() - started, 1)
            run["provenance"] = provenance(rounds=rounds, cpu_seconds=seconds, **_vector_unit())
            made.append(run)
            _put(path, name, made, whole=False)
            report(shown(run))
    except ImportError as error:
        report(f"{name}: a package to compare with is missing ({error}); the rest of this suite is left out")
        return
    _put(path, name, made, whole=not only)


def _lines(name: str, nanogpt: Path | None) -> Iterator[Comparison | MemoryComparison]:
    suite = import_module(f"attnbook.bench.{name}").suite
    yield from suite(nanogpt) if name in BESIDE_NANOGPT else suite()


def _vector_unit() -> dict[str, str]:
    from attnbook.functional.choice import processor

    return {"vector_unit": processor()}


def _put(path: Path, name: str, made: list[dict[str, Any]], *, whole: bool) -> None:
    """Store new lines of a suite; old ones of the same suite go when they are measured anew, or when all is."""
    runs = (stored(path.stem, folder=path.parent) or {"runs": []})["runs"]
    new = {tuple(run["settings"].values()) for run in made}
    kept = [
        run
        for run in runs
        if run["settings"]["suite"] != name or (not whole and tuple(run["settings"].values()) not in new)
    ]
    order = {suite: i for i, suite in enumerate(SUITES)}
    store(path, sorted(kept + made, key=lambda run: order.get(run["settings"]["suite"], len(order))))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run.

    Args:
        arguments: those of the command line by default.
    """
    parser = argparse.ArgumentParser(prog="python -m attnbook.bench", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), metavar="NAME")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="lines whose setting holds one of these")
    parser.add_argument("--json", type=Path, default=Path("results/bench.json"), metavar="FILE")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="nanoGPT's model.py, or the folder that holds it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="times are the processor's with 1, the wall's with more")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(HEADER)
    for name in options.suite:
        run_suite(name, rounds=options.rounds, path=options.json, only=options.only, nanogpt=options.nanogpt)


if __name__ == "__main__":
    main()
