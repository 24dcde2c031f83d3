"""How far a produced sequence is from the true one."""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Count the fewest insertions, deletions and substitutions that turn one sequence into the other.

    Args:
        first: of any comparable items.
        second: likewise.
    Returns:
        The Levenshtein distance.
    Cost: O(mn) time, O(n) memory.
    """
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def nearest_reference(found: Sequence, references: Sequence[Sequence]) -> tuple[int, int]:
    """Return the distance to the nearest of several references, and that reference's length.

    Args:
        found: what was produced.
        references: at least one.
    """
    return min((edit_distance(found, reference), len(reference)) for reference in references)
