"""Formulas for the number of parameters of what models are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Count a linear map's parameters.

    Args:
        inputs: width of what it takes.
        outputs: width of what it gives.
        bias: whether it has one.
    """
    return inputs * outputs + (outputs if bias else 0)


def network(widths: Sequence[int]) -> int:
    """Count the parameters of a chain of linear maps with biases.

    Args:
        widths: of the input, of each layer between, and of the output.
    """
    return sum(linear(a, b) for a, b in pairwise(widths))


def block(width: int, hidden: int | None = None) -> int:
    """Count the parameters of a Transformer block: self-attention, feed-forward network, two layer norms, all biases.

    Args:
        width: E.
        hidden: width of the feed-forward network; 4E by default.
    """
    hidden = hidden or 4 * width
    return 4 * linear(width, width) + network([width, hidden, width]) + 4 * width


def lstm(inputs: int, width: int, *, directions: int = 1) -> int:
    """Count the parameters of one layer of LSTM, with PyTorch's two biases.

    Args:
        inputs: width of what it takes.
        width: of the state of one direction.
        directions: 1, or 2 for a bidirectional layer.
    """
    return directions * 4 * (linear(inputs, width) + linear(width, width))
