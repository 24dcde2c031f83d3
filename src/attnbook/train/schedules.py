"""Learning-rate schedules: functions from the step to a factor of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from attnbook.shapes import check_choice, check_count, mismatch

SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt", "wsd")


def schedule(
    name: str, *, steps: int, warmup: int = 0, final: float = 0.0, cooldown: int | None = None
) -> Callable[[int], float]:
    """Return the factor by which the peak learning rate is multiplied at each step.

    After a linear warm-up, "constant" stays at 1; "cosine" ({cite}`loshchilov2017`, eq. 5, without restarts) and
    "linear" fall to ``final`` at the last step; "inverse_sqrt" falls as 1/√step ({cite}`vaswani2017`, eq. 3); "wsd"
    (warm-up, stable, decay) stays at 1 until the cooldown, then falls to ``final`` as 1 − √(share of the cooldown
    done), the form that {cite:t}`hagele2024` found best.

    Args:
        name: one of ``SCHEDULES``.
        steps: length of the run.
        warmup: steps until the peak.
        final: the factor at the end of "cosine", "linear" and "wsd".
        cooldown: the steps in which "wsd" falls; a fifth of the run by default.
    Returns:
        A function of the step, counted from 0.
    Raises:
        ValueError: an unknown name, steps below 1, a warm-up as long as the run, final outside [0, 1], a cooldown for
            another schedule or longer than what the warm-up leaves.
    """
    check_choice("name", name, SCHEDULES)
    check_count("steps", steps)
    if check_count("warmup", warmup, least=0) >= steps:
        raise mismatch("warmup", f"fewer than the {steps} steps", warmup)
    if not 0 <= final <= 1:
        raise mismatch("final", "a number in [0, 1]", final)
    if cooldown is None:
        cooldown = min(max(steps // 5, 1), steps - warmup - 1)
    elif name != "wsd":
        raise mismatch("cooldown", f"None with schedule {name!r}", cooldown)
    elif check_count("cooldown", cooldown) > steps - warmup - 1:
        raise mismatch("cooldown", f"at most the {steps - warmup - 1} steps after the peak", cooldown)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup - 1, 1), 1.0)
        if name == "constant":
            return 1.0
        if name == "inverse_sqrt":
            return math.sqrt((warmup + 1) / (step + 1))
        if name == "wsd":
            share = min(max(step - (steps - 1 - cooldown), 0) / max(cooldown, 1), 1.0)
            return final + (1 - final) * (1 - math.sqrt(share))
        left = (1 + math.cos(math.pi * done)) / 2 if name == "cosine" else 1 - done
        return final + (1 - final) * left

    return factor
