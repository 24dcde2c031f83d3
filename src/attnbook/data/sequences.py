"""Vocabularies and padded batches, for tasks that turn one sequence into another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnbook.shapes import check_count, mismatch

PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")


class Vocabulary:
    """A numbering of tokens; the first four numbers are padding, start, end, and unknown.

    Args:
        sequences: from which tokens are collected, the most frequent first, ties in alphabetical order.
        min_count: tokens seen less often are left to "unknown".
    Raises:
        ValueError: min_count below 1.
    """

    def __init__(self, sequences: Iterable[Sequence[str]], *, min_count: int = 1):
        check_count("min_count", min_count)
        counts = Counter(token for sequence in sequences for token in sequence)
        kept = sorted(
            (token for token, n in counts.items() if n >= min_count), key=lambda token: (-counts[token], token)
        )
        self.tokens = (*SPECIAL, *kept)
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, sequence: Sequence[str]) -> list[int]:
        """Turn tokens into numbers; unknown ones become ``UNKNOWN``."""
        return [self.numbers.get(token, UNKNOWN) for token in sequence]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Turn numbers into tokens, up to the first end; padding and start are left out."""
        tokens = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                tokens.append(self.tokens[number])
        return tokens


def pad_batch(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Stack sequences of different lengths, padded behind.

    Args:
        sequences: lists of integers; at least one, none of them empty.
    Returns:
        (B, longest) int64.
    Raises:
        ValueError: no sequence, or an empty one.
    """
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise mismatch("sequences", "at least one sequence, none of them empty", f"{[len(s) for s in sequences]}")
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[PAD] * (longest - len(sequence))] for sequence in sequences])


def teacher_forcing(targets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return what a decoder reads and what it should say: the targets behind a start, and before an end.

    Args:
        targets: lists of integers.
    Returns:
        Inputs (B, T) and outputs (B, T), int64, padded behind; T is one more than the longest target.
    """
    return pad_batch([[START, *target] for target in targets]), pad_batch([[*target, END] for target in targets])
