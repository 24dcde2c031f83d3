"""What a benchmark compares, and how."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnbook.measure import Ratio, interleaved, ratio

LEAST_SECONDS = 0.02


@dataclass(frozen=True)
class Comparison:
    """One line of the table: what is ours, who the peers are, and the goal.

    Attributes:
        suite: the group that the line belongs to.
        what: what is computed, forward or forward and backward.
        setting: shapes, type, mask.
        ours: calls our form once.
        peers: call each peer once, by name; ours is compared with the fastest of them in the run.
        goal: the ratio of times, ours to the best peer's, that we want to stay below; None where none is set.
        wall: take the wall's clock on one thread too, because the work is a GPU's.
    """

    suite: str
    what: str
    setting: str
    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    goal: float | None
    wall: bool = False


@dataclass(frozen=True)
class Program:
    """Something to run in a process of its own.

    Attributes:
        maker: "module:function", which takes ``length`` and the settings and returns a function that does the work.
        length: the first size; the work is done once with 64 beforehand, to load what is loaded once.
        settings: further arguments, which JSON can hold.
    """

    maker: str
    length: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class MemoryComparison:
    """One line of the table that compares peak memory beyond the inputs.

    Attributes:
        suite: the group that the line belongs to.
        what: what is computed.
        setting: shapes, type, mask.
        ours: our form.
        peers: the others, by name; ours is compared with the smallest of them.
        goal: the ratio of memory, ours to the best peer's, that we want to stay below.
    """

    suite: str
    what: str
    setting: str
    ours: Program
    peers: Mapping[str, Program]
    goal: float | None


Suite = Callable[
    [], Iterator["Comparison | MemoryComparison"]
]  # yields one comparison after another, so that only one holds memory


@dataclass(frozen=True)
class Timing:
    """What a comparison measured.

    Attributes:
        best: the fastest peer's name.
        ratio: our time over the best peer's: median of the rounds and quartiles.
        seconds: each one's median time; ours under "attnbook".
    """

    best: str
    ratio: Ratio
    seconds: dict[str, float]


def peak_extra(program: Program) -> int:
    """Measure in a fresh process how far the resident set grows, at most, once the inputs exist.

    Args:
        program: what to run.
    Returns:
        Bytes.
    """
    words = [program.maker, str(program.length), json.dumps(dict(program.settings)), str(torch.get_num_threads())]
    found = subprocess.run(
        [sys.executable, "-m", "attnbook.bench.memory", *words], capture_output=True, text=True, check=True
    )
    return int(found.stdout)


def _repeated(function: Callable[[], Any], clock: Callable[[], float]) -> tuple[Callable[[], Any], int]:
    """Return a function that calls another so often that it lasts, and how often that is."""
    function()
    started = clock()
    function()
    times = max(1, min(1000, round(LEAST_SECONDS / max(clock() - started, 1e-6))))

    def many() -> None:
        for _ in range(times):
            function()

    return many, times


def compare(comparison: Comparison, *, rounds: int = 7) -> Timing:
    """Time ours and the peers in turns; by the processor's clock on one thread, by the wall's on more.

    Short calls are repeated until they last 20 ms, so that what one leaves in the caches is not charged to the next.

    Args:
        comparison: what to time.
        rounds: how often.
    Returns:
        The ratio to the fastest peer, and everyone's median time.
    """
    by_processor = torch.get_num_threads() == 1 and not comparison.wall
    clock = time.process_time if by_processor else time.perf_counter
    repeated = {name: _repeated(f, clock) for name, f in {"attnbook": comparison.ours, **comparison.peers}.items()}
    taken = interleaved({name: many for name, (many, _) in repeated.items()}, rounds=rounds, clock=clock)
    times = {name: [seconds / repeated[name][1] for seconds in each] for name, each in taken.items()}
    seconds = {name: statistics.median(each) for name, each in times.items()}
    best = min(comparison.peers, key=seconds.__getitem__)
    return Timing(best, ratio(times, "attnbook", best), seconds)
