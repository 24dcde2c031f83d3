"""Byte-pair encoding: tokens between bytes and words, learned by counting."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from attnbook.shapes import check_count, describe, mismatch

Pair = tuple[int, int]
# Pieces that no merge crosses: a word, a number or other signs, each with the space before it, and other white space.
_PIECES = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+")


def pieces(content: bytes) -> list[bytes]:
    """Cut bytes into words, numbers, other signs and white space, in the manner of {cite}`radford2019`.

    Args:
        content: any bytes; those above 127 count as letters.
    Returns:
        The pieces in order; joined, they are the content again.
    """
    return _PIECES.findall(content)


def merge(tokens: list[int], pair: Pair, new: int) -> list[int]:
    """Replace a pair of neighbours by one token, from the left, without overlap.

    Args:
        tokens: a sequence.
        pair: what to replace.
        new: by what.
    """
    merged, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


class BytePairEncoding:
    """A tokeniser whose tokens are the 256 bytes and what its merges make of them.

    The method is Gage's compression ({cite}`gage1994`) as {cite}`sennrich2016` use it for words, over bytes as in
    {cite}`radford2019`: nothing is ever unknown.

    Args:
        merges: pairs of tokens; the i-th makes token 256 + i.
    Raises:
        ValueError: a pair of tokens that do not exist yet, or a pair that comes twice.
    """

    def __init__(self, merges: Iterable[Pair] = ()):
        self.merges: list[Pair] = []
        self.tokens: list[bytes] = [bytes([value]) for value in range(256)]
        self._rank: dict[Pair, int] = {}
        for pair in merges:
            self._add(tuple(pair))

    def _add(self, pair: Pair) -> None:
        if len(pair) != 2 or not all(0 <= token < len(self.tokens) for token in pair) or pair in self._rank:
            raise mismatch("merges", f"new pairs of tokens below {len(self.tokens)}", f"{pair}")
        self._rank[pair] = len(self.merges)
        self.merges.append(pair)
        self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def train(cls, text: str | bytes, vocab_size: int) -> BytePairEncoding:
        """Learn merges: again and again, make the most frequent pair of neighbours one token.

        Args:
            text: to learn from.
            vocab_size: tokens wanted, the 256 bytes among them; fewer result where no pair is left. Of pairs that are
                equally frequent, the one with the smaller numbers is taken.
        Returns:
            The tokeniser.
        Raises:
            ValueError: a vocabulary of fewer than 256, or no text.
        Cost: O(n + Σ pieces that a merge touches); equal pieces are counted, not stored twice.
        """
        check_count("vocab_size", vocab_size, least=256)
        counted = Counter(pieces(_bytes("text", text)))
        words, times = [list(piece) for piece in counted], list(counted.values())
        counts: Counter[Pair] = Counter()
        places: dict[Pair, set[int]] = defaultdict(set)
        for i, word in enumerate(words):
            for pair in itertools.pairwise(word):
                counts[pair] += times[i]
                places[pair].add(i)
        heap = [(-count, pair) for pair, count in counts.items()]
        heapq.heapify(heap)
        made = cls()
        while heap and len(made) < vocab_size:
            negative, best = heapq.heappop(heap)
            if counts[best] != -negative or not counts[best]:
                continue  # an entry that later merges outdated; the right one is in the heap too
            made._add(best)
            touched = set()
            for i in list(places[best]):
                old, words[i] = words[i], merge(words[i], best, len(made) - 1)
                for word, sign in ((old, -1), (words[i], 1)):
                    for pair in itertools.pairwise(word):
                        counts[pair] += sign * times[i]
                        places[pair].add(i)
                        touched.add(pair)
            for pair in touched:
                heapq.heappush(heap, (-counts[pair], pair))
        return made

    def _encode_piece(self, piece: bytes) -> list[int]:
        """Apply the merges to one piece, in the order in which they were learned."""
        tokens = list(piece)
        while len(tokens) > 1:
            first = min(itertools.pairwise(tokens), key=lambda pair: self._rank.get(pair, len(self.merges)))
            if first not in self._rank:
                break
            tokens = merge(tokens, first, 256 + self._rank[first])
        return tokens

    def encode(self, text: str | bytes) -> Tensor:
        """Turn text into tokens.

        Args:
            text: characters (as UTF-8) or bytes.
        Returns:
            (length,) int64.
        Raises:
            ValueError: neither.
        """
        known: dict[bytes, list[int]] = {}
        found: list[int] = []
        for piece in pieces(_bytes("text", text)):
            if piece not in known:
                known[piece] = self._encode_piece(piece)
            found.extend(known[piece])
        return torch.tensor(found, dtype=torch.int64)

    def decode_bytes(self, tokens: Tensor | Iterable[int]) -> bytes:
        """Turn tokens into the bytes that they stand for.

        Args:
            tokens: (length,) integers below the vocabulary's size.
        Raises:
            ValueError: a token that does not exist.
        """
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise mismatch("tokens", f"integers in [0, {len(self) - 1}]", f"{min(numbers)} to {max(numbers)}")
        return b"".join(self.tokens[number] for number in numbers)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """Turn tokens into characters; bytes that are no UTF-8 become the replacement character U+FFFD.

        Args:
            tokens: (length,) integers below the vocabulary's size.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


def _bytes(name: str, text: str | bytes) -> bytes:
    if not isinstance(text, (str, bytes)):
        raise mismatch(name, "a string or bytes", describe(text))
    return text.encode("utf-8") if isinstance(text, str) else text
