"""When do two outputs agree? Words and integers exactly, decimals within 2 %, claims by their own tolerance."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

CLAIM = "application/vnd.attnbook.claim+json"
ATTEMPT = "application/vnd.attnbook.attempt+json"
GLUE = "application/papermill.record/text/plain"
RELATIVE, ABSOLUTE = 2e-2, 1e-6
# A number with a point or an exponent, not inside a word.
DECIMAL = re.compile(
    r"(?<![\w.])[-+−]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])|(?<![\w.])[-+−]?\d+[eE][-+]?\d+(?!\w)"
)
VOLATILE = {"measured", "values", "interval"}  # of a claim: judged by the claim itself when it ran


@dataclass
class Comparison:
    """What came of comparing one cell's outputs.

    Attributes:
        compared: outputs whose text was compared.
        judged: outputs that a claim judged.
        differences: what differs, in words.
    """

    compared: int = 0
    judged: int = 0
    differences: list[str] = field(default_factory=list)


def text_difference(expected: str, found: str) -> str | None:
    """Return the first line that differs, or None where two texts agree."""
    old, new = expected.rstrip().split("\n"), found.rstrip().split("\n")
    for number in range(max(len(old), len(new))):
        a = old[number] if number < len(old) else None
        b = new[number] if number < len(new) else None
        if a is None or b is None or not _lines_agree(a, b):
            return f"expected {a!r}\n  got      {b!r}"
    return None


def _lines_agree(a: str, b: str) -> bool:
    words = [" ".join(DECIMAL.sub("#", line).split()) for line in (a, b)]
    if words[0] != words[1]:
        return False
    numbers = [[float(x.replace("−", "-")) for x in DECIMAL.findall(line)] for line in (a, b)]
    return all(math.isclose(x, y, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for x, y in zip(*numbers, strict=True))


def _streams(outputs: list[Any]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for output in outputs:
        if output["output_type"] == "stream":
            texts[output["name"]] = texts.get(output["name"], "") + output["text"]
    return texts


def _claims(outputs: list[Any]) -> set[str]:
    return {output["data"][CLAIM]["id"] for output in outputs if CLAIM in output.get("data", {})}


def compare(expected: list[Any], found: list[Any]) -> Comparison:
    """Compare the outputs of a cell with those that are committed.

    Args:
        expected: the committed outputs.
        found: those of the run.
    """
    result = Comparison()
    old_streams, new_streams = _streams(expected), _streams(found)
    for name in sorted({*old_streams, *new_streams}):
        result.compared += 1
        difference = text_difference(old_streams.get(name, ""), new_streams.get(name, ""))
        if difference:
            result.differences.append(f"{name}: {difference}")
    old = [output for output in expected if "data" in output]
    new = [output for output in found if "data" in output]
    if len(old) != len(new):
        result.differences.append(f"expected {len(old)} displayed results, got {len(new)}")
        return result
    judged = _claims(found)
    for a, b in zip(old, new, strict=True):
        _compare_one(a, b, judged, result)
    return result


def _compare_one(old: Any, new: Any, judged: set[str], result: Comparison) -> None:
    if CLAIM in new["data"] or CLAIM in old["data"]:
        result.judged += 1
        records = [
            {k: v for k, v in output["data"].get(CLAIM, {}).items() if k not in VOLATILE} for output in (old, new)
        ]
        if records[0] != records[1]:
            keys = [key for key in {**records[0], **records[1]} if records[0].get(key) != records[1].get(key)]
            parts = [f"{key}: expected {records[0].get(key)!r}, got {records[1].get(key)!r}" for key in sorted(keys)]
            result.differences.append("claim: " + "; ".join(parts))
        return
    name = new["metadata"].get("scrapbook", {}).get("name")
    if name in judged:
        return  # the value that a claim glued: judged with it
    for mime in ("text/plain", GLUE, ATTEMPT):
        a, b = old["data"].get(mime), new["data"].get(mime)
        if a is None and b is None:
            continue
        result.compared += 1
        difference = text_difference(_text(a), _text(b))
        if difference:
            label = f"glued {name!r}" if mime == GLUE else mime
            result.differences.append(f"{label}: {difference}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "".join(value)
    return "" if value is None else value if isinstance(value, str) else repr(dict(value))
