"""What ``backend="auto"`` takes: a small measured table, and the rules around it.

The table is ``backends.json`` beside this file, made by ``python -m attnbook.bench.choose``. It has a part for each
kind of processor that was measured, and in it a row for each combination of element type, gradient, mask and lengths:
the candidates' times on one thread and on all, and which of them to take. Candidates are those that need no compiling.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnbook.functional.backends import Call
from attnbook.mechanisms.stored import multiplies_fast
from attnbook.shapes import values_are_readable

TABLE = Path(__file__).with_name("backends.json")
MOST_STORED = 2**28  # bytes of weights that "auto" is willing to keep for a backward pass
DEFAULT = "AVX2"  # the part of the table for processors that nobody measured

Setting = tuple[str, bool, str]  # element type, gradient, mask


def processor() -> str:
    """Name the kind of processor, as far as the choice depends on it: "+bf16" where it multiplies bfloat16."""
    return torch.backends.cpu.get_cpu_capability() + ("+bf16" if multiplies_fast(torch.bfloat16) else "")


@cache
def _rows(kind: str) -> dict[Setting, tuple[tuple[float, float, str], ...]]:
    """Return the table's part for a kind of processor: for each setting, log L, log S and what to take there."""
    parts = json.loads(TABLE.read_text(encoding="utf-8"))
    found: dict[Setting, list[tuple[float, float, str]]] = {}
    for row in parts.get(kind, parts[DEFAULT])["rows"]:
        setting = (row["dtype"], row["gradient"], row["mask"])
        found.setdefault(setting, []).append((math.log(row["L"]), math.log(row["S"]), row["take"]))
    return {setting: tuple(rows) for setting, rows in found.items()}


@cache
def nearest(kind: str, setting: Setting, L: int, S: int) -> str:
    """Return what to take at the lengths nearest to these, on a logarithmic scale.

    Args:
        kind: of processor, as :func:`processor` names it.
        setting: element type, whether a gradient is wanted, and the kind of mask.
        L: queries.
        S: keys.
    """
    rows = _rows(kind).get(setting)
    if not rows:
        return "sdpa"
    return min(rows, key=lambda row: abs(row[0] - math.log(L)) + abs(row[1] - math.log(S)))[2]


@cache
def _this_processor() -> str:
    return processor()


@cache
def _take(half: bool, gradient: bool, tensor: bool, is_causal: bool, L: int, S: int) -> str:
    mask = "tensor" if tensor else "causal" if is_causal else "none"
    return nearest(_this_processor(), ("bfloat16" if half else "float32", gradient, mask), L, S)


def choose(call: Call) -> str:
    """Choose the backend for a call of softmax attention.

    PyTorch's fused kernel takes what is not on the processor, what is compiled or transformed, and dropout; the table
    has the rest. Weights are kept for a backward pass up to 256 MiB.

    Args:
        call: what to compute.
    Returns:
        A name in ``attnbook.functional.BACKENDS``.
    """
    query, shape = call.query, call.shape
    if call.dropout_p or not values_are_readable(query):
        return "sdpa"
    gradient, tensor = call.wants_gradient, call.mask is not None or call.bias is not None
    take = _take(query.itemsize == 2, gradient, tensor, call.is_causal, shape.L, shape.S)
    if take == "stored" and gradient and shape.B * shape.H * shape.L * shape.S * max(query.itemsize, 4) > MOST_STORED:
        return "sdpa"
    return take


def table() -> dict[str, Any]:
    """Return the whole table, as it is stored."""
    return json.loads(TABLE.read_text(encoding="utf-8"))
