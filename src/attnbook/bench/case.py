"""What a benchmark compares, and how."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnbook.measure import Ratio, interleaved, ratio


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


Suite = Callable[[], Iterator[Comparison]]  # yields one comparison after another, so that only one holds memory


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


def compare(comparison: Comparison, *, rounds: int = 7) -> Timing:
    """Time ours and the peers in turns; by the processor's clock on one thread, by the wall's on more.

    Args:
        comparison: what to time.
        rounds: how often.
    Returns:
        The ratio to the fastest peer, and everyone's median time.
    """
    by_processor = torch.get_num_threads() == 1 and not comparison.wall
    clock = time.process_time if by_processor else time.perf_counter
    times = interleaved({"attnbook": comparison.ours, **comparison.peers}, rounds=rounds, clock=clock)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    best = min(comparison.peers, key=seconds.__getitem__)
    return Timing(best, ratio(times, "attnbook", best), seconds)
