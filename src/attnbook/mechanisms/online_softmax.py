"""Online softmax: a softmax-weighted mean that takes its scores in pieces ({cite}`milakov2018`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbook.shapes import mismatch


class OnlineSoftmax:
    """What is known of some rows' attention after a part of the keys: three numbers a row, and nothing more is needed.

    Together they stand for the pair (Σ exp z, Σ exp z · v), each written as exp(top) times something of moderate size.
    Chapter: {ref}`sec-15-flash`.

    Attributes:
        top: (B, rows, 1), the largest score so far; −∞ before the first.
        total: (B, rows, 1), Σ exp(score − top).
        mix: (B, rows, Dv), Σ exp(score − top) · value.
    """

    def __init__(self, top: Tensor, total: Tensor, mix: Tensor):
        self.top, self.total, self.mix = top, total, mix

    @classmethod
    def empty(cls, rows: Tensor, Dv: int) -> OnlineSoftmax:
        """Begin, before any key.

        Args:
            rows: (B, rows, …), of whose type and device the state shall be.
            Dv: size of a value.
        Returns:
            The state that changes nothing when another is merged with it.
        """
        top = rows.new_full((*rows.shape[:2], 1), -math.inf)
        return cls(top, torch.zeros_like(top), rows.new_zeros(*rows.shape[:2], Dv))

    @classmethod
    def after(cls, output: Tensor, log_sum: Tensor) -> OnlineSoftmax:
        """Take up again from what :meth:`output` and :meth:`log_sum` gave.

        Args:
            output: (B, rows, Dv).
            log_sum: (B, rows, 1).
        Returns:
            A state that gives the same two.
        """
        return cls(log_sum, (log_sum > -math.inf).to(output.dtype), output)

    def absorb(self, scores: Tensor, values: Tensor) -> None:
        """Take in a block of keys that was not seen before.

        Args:
            scores: (B, rows, keys), −∞ where attention is not allowed; overwritten, to save memory.
            values: (B, keys, Dv).
        Raises:
            ValueError: scores that do not fit the state's rows, or values that fit neither.
        """
        B, rows, Dv = self.mix.shape
        if scores.dim() != 3 or scores.shape[:2] != (B, rows):
            raise mismatch("scores", f"(B, rows, keys) = ({B}, {rows}, …)", scores)
        if values.shape != (B, scores.shape[2], Dv):
            raise mismatch("values", f"(B, keys, Dv) = {(B, scores.shape[2], Dv)}", values)
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        finite = top.masked_fill(top == -math.inf, 0.0)  # a row that is still empty: exp(−∞ − 0) = 0, not NaN
        weights = scores.sub_(finite).exp_()
        shrink = self.top.sub(finite).exp_()  # the old sums were relative to the old top
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)
        self.mix = torch.baddbmm(self.mix.mul_(shrink), weights, values)
        self.top = top

    def merge(self, other: OnlineSoftmax) -> OnlineSoftmax:
        """Join two states that saw different keys.

        Args:
            other: of the same rows.
        Returns:
            The state after both; neither changes. Associative and commutative, up to rounding.
        Raises:
            ValueError: shapes that differ.
        """
        if other.mix.shape != self.mix.shape:
            raise mismatch("other", f"a state with mix of shape {tuple(self.mix.shape)}", other.mix)
        top = torch.maximum(self.top, other.top)
        finite = top.masked_fill(top == -math.inf, 0.0)
        mine, theirs = (self.top - finite).exp(), (other.top - finite).exp()
        return OnlineSoftmax(top, self.total * mine + other.total * theirs, self.mix * mine + other.mix * theirs)

    def output(self) -> Tensor:
        """Return the mean of the values seen, (B, rows, Dv); zero in a row that saw none."""
        return self.mix / self.total.where(self.total > 0, 1.0)

    def log_sum(self) -> Tensor:
        """Return log Σ exp(score) of the keys seen, (B, rows, 1); −∞ in a row that saw none."""
        return self.top + self.total.log()
