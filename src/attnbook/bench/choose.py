"""Make anew the table by which ``backend="auto"`` chooses: ``python -m attnbook.bench.choose``.

The part for this machine's kind of processor is replaced, the others stay. Every row is timed on one thread and on all;
what is taken is the candidate that comes off best where it comes off worse.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnbook import masks
from attnbook.functional import attention
from attnbook.functional.choice import MOST_STORED, TABLE, processor, table
from attnbook.measure import interleaved
from attnbook.provenance import provenance

LENGTHS = ((1, 256), (1, 2048), (64, 64), (256, 256), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096))
HEADS, WIDTH = 8, 64
SLACK = 1.05  # PyTorch's kernel is taken unless another is quicker by more than this


def settings() -> Iterator[dict[str, Any]]:
    """Yield what the table has rows for."""
    for (L, S), dtype, gradient, mask in itertools.product(
        LENGTHS, ("float32", "bfloat16"), (False, True), ("none", "causal", "tensor")
    ):
        if not (L == 1 and mask == "causal"):
            yield {"dtype": dtype, "gradient": gradient, "mask": mask, "L": L, "S": S}


def _calls(dtype: str, gradient: bool, mask: str, L: int, S: int) -> dict[str, Callable[[], Any]]:
    """Return the candidates: ``attention`` with each backend that needs no compiling and keeps to its memory."""
    q, k, v, grad = (torch.randn(1, HEADS, n, WIDTH).to(getattr(torch, dtype)) for n in (L, S, S, L))
    options: dict[str, Any] = {"is_causal": mask == "causal"}
    if mask == "tensor":
        options["attn_mask"] = masks.padding(torch.tensor([max(S - S // 8, 1)]), S)
    inputs = [x.requires_grad_(gradient) for x in (q, k, v)]

    def call(backend: str) -> Callable[[], Any]:
        if not gradient:
            return lambda: attention(*inputs, backend=backend, **options)
        return lambda: torch.autograd.grad(attention(*inputs, backend=backend, **options), inputs, grad)

    kept = HEADS * L * S * 4
    names = ["sdpa", "tiled"]
    names += ["stored"] if kept <= MOST_STORED or not gradient else []
    names += ["reference"] if L <= 256 else []  # it is the slowest from there on
    return {name: call(name) for name in names}


def times_of(setting: dict[str, Any], threads: int, *, rounds: int) -> dict[str, float]:
    """Time the candidates of one row.

    Args:
        setting: one of :func:`settings`.
        threads: on how many; times are the processor's with one, the wall's with more.
        rounds: how often.
    Returns:
        Everyone's median time of a call, in milliseconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    repeat = 1 if setting["L"] * setting["S"] > 256 * 256 else 20  # a call of some microseconds is timed with others
    many = {name: (lambda call=call: [call() for _ in range(repeat)]) for name, call in _calls(**setting).items()}
    clock = time.process_time if threads == 1 else time.perf_counter
    taken = interleaved(many, rounds=rounds if setting["L"] <= 1024 else 3, clock=clock)
    torch.set_num_threads(before)
    return {name: float(f"{1e3 * statistics.median(each) / repeat:.4g}") for name, each in taken.items()}


def row(setting: dict[str, Any], *, rounds: int) -> dict[str, Any]:
    """Time the candidates of one row, and choose.

    Args:
        setting: one of :func:`settings`.
        rounds: how often.
    Returns:
        The setting, the name to take, and everyone's median times in milliseconds, by the number of threads.
    """
    ms = {threads: times_of(setting, threads, rounds=rounds) for threads in dict.fromkeys((1, torch.get_num_threads()))}
    worst = {name: max(times[name] / min(times.values()) for times in ms.values()) for name in ms[1]}
    best = min(worst, key=worst.__getitem__)
    take = "sdpa" if worst["sdpa"] <= SLACK * worst[best] else best
    return {**setting, "take": take, "ms": {str(threads): times for threads, times in ms.items()}}


def main(rounds: int = 7) -> None:
    """Measure every row and replace this kind of processor's part of the table.

    Args:
        rounds: how often each candidate is timed.
    """
    started = time.process_time()
    rows = []
    for setting in settings():
        rows.append(row(setting, rounds=rounds))
        print(rows[-1], flush=True)
    seconds = round(time.process_time() - started, 1)
    parts = {**table(), processor(): {"provenance": provenance(rounds=rounds, cpu_seconds=seconds), "rows": rows}}
    lines = []
    for kind, part in parts.items():
        inner = ",\n".join(json.dumps(each) for each in part["rows"])
        origin = json.dumps(part["provenance"], ensure_ascii=False)
        lines.append(f'{json.dumps(kind)}: {{"provenance": {origin}, "rows": [\n{inner}\n]}}')
    TABLE.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
