"""Intervals: how far an estimate would move if the data were drawn again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.shapes import check_count, describe, mismatch


def take(sample: Any, index: ArrayLike) -> Any:
    """Take some rows of an array, or of every column of a named tuple of arrays.

    Args:
        sample: an array, or a named tuple of arrays of one length.
        index: numbers of rows, or a boolean mask.
    Returns:
        The same kind of sample.
    """
    index = np.asarray(index)
    return type(sample)(*(column[index] for column in sample)) if hasattr(sample, "_fields") else sample[index]


def bootstrap(
    estimate: Callable[[Any], ArrayLike],
    sample: Any,
    *,
    count: int,
    generator: np.random.Generator,
    share: float = 1.0,
    replace: bool = True,
) -> NDArray[np.float64]:
    """Repeat an estimate on resampled rows ({cite}`efron1979`).

    Args:
        estimate: maps a sample to a number or a vector.
        sample: an array, or a named tuple of arrays of one length.
        count: repetitions.
        generator: NumPy's.
        share: of the rows drawn each time.
        replace: draw with replacement; without it, and with a share below one, this is subsampling.
    Returns:
        (count,) or (count, k); NaN where the estimate raised ``ValueError``.
    Raises:
        ValueError: count below 1, a share outside (0, 1], estimates that all fail.
    """
    check_count("count", count)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise mismatch("share", "a number in (0, 1]", describe(share))
    rows = len(sample[0] if hasattr(sample, "_fields") else sample)
    found: list[NDArray[np.float64] | None] = []
    for _ in range(count):
        drawn = take(sample, generator.choice(rows, round(share * rows), replace=replace))
        try:
            found.append(np.asarray(estimate(drawn), dtype=float))
        except ValueError:
            found.append(None)
    shapes = {row.shape for row in found if row is not None}
    if not shapes:
        raise mismatch("estimate", "a value for some of the samples", "ValueError for all of them")
    return np.stack([np.full(next(iter(shapes)), np.nan) if row is None else row for row in found])


def interval(samples: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds a share of the samples; NaN are passed over.

    Args:
        samples: numbers, such as :func:`bootstrap` returns.
        level: the share, between 0 and 1.
    Raises:
        ValueError: no such share.
    """
    if not 0 < level < 1:
        raise mismatch("level", "a number between 0 and 1", level)
    low, high = np.nanquantile(np.asarray(samples, dtype=float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
