"""An n-gram language model with Kneser–Ney smoothing: counting, done as well as counting can be."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.shapes import check_count, mismatch

_PER_BLOCK = 1 << 18  # positions scored at once


class _Order:
    """The n-grams of one order: their codes in ascending order, and what is needed to score them."""

    def __init__(self, codes: NDArray[np.int64], counts: NDArray[np.int64], vocab_size: int):
        self.codes = codes
        ones, twos, threes, fours = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
        y = ones / (ones + 2 * twos)
        self.discounts = np.clip(
            [0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes], 0, None
        )
        bucket = np.minimum(counts, 3)
        self.kept = counts - self.discounts[bucket]  # counts after the discount
        self.contexts, start = np.unique(codes // vocab_size, return_index=True)
        self.totals = np.add.reduceat(counts, start)
        self.freed = np.add.reduceat(self.discounts[bucket], start)  # what the discounts leave for lower orders


class KneserNey:
    """Interpolated modified Kneser–Ney smoothing ({cite}`kneser1995`; {cite}`chen1999`, §3).

    The highest order uses counts; each lower one counts in how many different contexts an n-gram was seen. A constant
    that depends on the count (1, 2, or more) is taken off, and what that frees goes to the next lower order; the lowest
    backs off to the uniform distribution. The discounts are Chen and Goodman's closed-form estimates.

    Args:
        order: n; the model looks back n − 1 tokens.
        vocab_size: V. V to the power n must fit 63 bits.
    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, order: int, vocab_size: int):
        self.order = check_count("order", order)
        self.vocab_size = check_count("vocab_size", vocab_size, least=2)
        if order * np.log2(vocab_size) >= 63:
            raise mismatch("order", f"at most {int(63 / np.log2(vocab_size))} for {vocab_size} tokens", order)
        self.orders: list[_Order] = []

    def _codes(self, tokens: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """Return the code of the n-gram that ends at each of the positions n − 1, n, …: its tokens as digits base V."""
        codes = np.zeros(len(tokens) - n + 1, dtype=np.int64)
        for i in range(n):
            codes = codes * self.vocab_size + tokens[i : len(tokens) - n + 1 + i]
        return codes

    def _check(self, tokens: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(tokens)
        if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
            raise mismatch("tokens", "a non-empty sequence of integers", f"{array.dtype} array of shape {array.shape}")
        if array.min() < 0 or array.max() >= self.vocab_size:
            raise mismatch("tokens", f"integers in [0, {self.vocab_size - 1}]", f"up to {array.max()}")
        return array.astype(np.int64)

    def fit(self, tokens: ArrayLike) -> KneserNey:
        """Count the n-grams of a text.

        Args:
            tokens: (length,) integers below V; at least n of them.
        Returns:
            The model itself.
        Raises:
            ValueError: no integers, or too few.
        """
        text = self._check(tokens)
        if len(text) < self.order:
            raise mismatch("tokens", f"at least {self.order} tokens", f"{len(text)}")
        self.orders = []
        codes, counts = np.unique(self._codes(text, self.order), return_counts=True)
        for n in range(self.order, 0, -1):
            self.orders.insert(0, _Order(codes, counts, self.vocab_size))
            if n > 1:  # in how many contexts was each shorter n-gram seen?
                codes, counts = np.unique(codes % self.vocab_size ** (n - 1), return_counts=True)
        return self

    def num_parameters(self) -> int:
        """Return how many numbers the fitted model stores: one for each n-gram of each order, two for each context."""
        return sum(len(order.codes) + 2 * len(order.contexts) for order in self.orders)

    def _refine(self, lower: NDArray, order: _Order, context: NDArray, token: NDArray) -> NDArray:
        """Interpolate the probabilities of the lower order with this one's."""
        code = context * self.vocab_size + token
        at = np.minimum(np.searchsorted(order.codes, code), len(order.codes) - 1)
        kept = np.where(order.codes[at] == code, order.kept[at], 0.0)
        at = np.minimum(np.searchsorted(order.contexts, context), len(order.contexts) - 1)
        known = order.contexts[at] == context
        return np.where(known, (kept + order.freed[at] * lower) / order.totals[at], lower)

    def log_probabilities(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Score a text: the natural logarithm of each token's probability given those before it.

        Args:
            tokens: (length,) integers below V.
        Returns:
            (length,) float64; the first tokens are scored with the shorter contexts that they have.
        Raises:
            ValueError: no integers, or a model that was not fitted.
        """
        text = self._check(tokens)
        if not self.orders:
            raise mismatch("self", "a fitted model", "one without counts")
        result = np.empty(len(text))
        for start in range(0, len(text), _PER_BLOCK):
            before = max(start - self.order + 1, 0)
            part = text[before : start + _PER_BLOCK]
            probability = np.full(len(part), 1.0 / self.vocab_size)
            for n, order in enumerate(self.orders, 1):
                if len(part) < n:
                    break
                codes = self._codes(part, n)
                refined = self._refine(probability[n - 1 :], order, codes // self.vocab_size, part[n - 1 :])
                probability = np.concatenate([probability[: n - 1], refined])
            result[start : start + _PER_BLOCK] = np.log(probability[start - before :])
        return result

    def probabilities(self, context: ArrayLike) -> NDArray[np.float64]:
        """Return the distribution of the next token.

        Args:
            context: (length,) integers below V; only the last n − 1 matter. May be empty.
        Returns:
            (V,) float64, summing to 1.
        Raises:
            ValueError: no integers, or a model that was not fitted.
        """
        if not self.orders:
            raise mismatch("self", "a fitted model", "one without counts")
        past = np.asarray(context)
        past = self._check(past)[::-1][: self.order - 1] if past.size else ()  # the newest first
        tokens = np.arange(self.vocab_size)
        probability = np.full(self.vocab_size, 1.0 / self.vocab_size)
        code = 0
        for n in range(1, len(past) + 2):
            probability = self._refine(probability, self.orders[n - 1], np.full_like(tokens, code), tokens)
            if n <= len(past):
                code += int(past[n - 1]) * self.vocab_size ** (n - 1)
        return probability
