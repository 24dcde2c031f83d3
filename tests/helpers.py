"""What several test files use."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnbook import data

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "attnbook"
BACKENDS = ("reference", "sdpa", "stored", "tiled")  # of those that run everywhere, with every option
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# How far an output, and a gradient, of each type may lie from NumPy's float64 result on the same (already rounded)
# inputs: |ours − NumPy's| ≤ tolerance · (|NumPy's| + the largest |NumPy's|, at least 1). Half precision is summed in
# float32 and rounded once at the end, so bfloat16 may err by 2⁻⁸ and float16 by 2⁻¹¹; gradients of "tiled" start from
# the rounded output, and those of grouped heads are added up after rounding, hence a factor of four.
TOLERANCE = {
    torch.float64: (5e-15, 2e-14),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (2**-8, 2**-6),
    torch.float16: (2**-11, 2**-9),
}


def name_of(value: Any) -> str | None:
    """Name a parameter of a test, where pytest's own name says nothing."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        return "x".join(map(str, value))
    return None


def array(tensor: Tensor) -> np.ndarray:
    """Turn any tensor into a NumPy array, half precision into float64."""
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def assert_close(actual: Tensor, expected: Any, *, gradient: bool = False, times: float = 1, name: str = "") -> None:
    """Assert that a tensor equals NumPy's result within :data:`TOLERANCE` (``times`` it, where a test says why)."""
    tolerance = TOLERANCE[actual.dtype][gradient] * times
    expected = array(expected) if isinstance(expected, Tensor) else np.asarray(expected)
    largest = max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(array(actual), expected, rtol=tolerance, atol=tolerance * largest, err_msg=name)


def complains(text: str, error: type[Exception] = ValueError):
    """Expect an error with exactly this text; "…" stands for anything."""
    return pytest.raises(error, match="^" + ".*".join(map(re.escape, text.split("…"))) + "$")


@cache
def loaded(name: str, **options: Any) -> Any:
    """Load a data set once for all tests; where it is not on this machine, skip the test and say what would help."""
    try:
        return data.load(name, **options)
    except data.DataUnavailable as error:
        pytest.skip(str(error))


@cache
def bibliography() -> frozenset[str]:
    """Return the keys of the book's bibliography."""
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE))


def tokens(*shape: int, high: int, low: int = 0, seed: int = 0) -> Tensor:
    """Draw integers in [low, high)."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
