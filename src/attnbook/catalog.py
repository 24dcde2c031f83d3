"""The catalog: every mechanism of the library with its paper, its cost and its chapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from attnbook.functional import attention
from attnbook.mechanisms import hard_attention, local_attention, tiled_attention


@dataclass(frozen=True)
class Mechanism:
    """One attention mechanism.

    Attributes:
        name: how the field calls it.
        function: called as ``function(query, key, value, *, is_causal=False, …)``.
        paper: the bibliography's key of the paper that introduced it.
        exact: whether it computes softmax attention itself; if not, ``error`` says how it differs.
        causal: how it is made causal: "mask", "always", or "no".
        time: cost in time, for L = S = N.
        memory: memory beyond inputs and output.
        chapter: the chapter that treats it, as in its file's name.
        error: for an approximation, the law of its error; for another function, what it computes.
    """

    name: str
    function: Callable[..., Tensor]
    paper: str
    exact: bool
    causal: str
    time: str
    memory: str
    chapter: str
    error: str = ""


_ALL = (
    Mechanism(
        name="scaled dot-product attention",
        function=attention,
        paper="vaswani2017",
        exact=True,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="02-scaled-dot-product",
    ),
    Mechanism(
        name="tiled attention",
        function=tiled_attention,
        paper="dao2022",
        exact=True,
        causal="mask",
        time="O(N²D)",
        memory="O(N)",
        chapter="15-flash",
    ),
    Mechanism(
        name="local attention",
        function=local_attention,
        paper="luong2015",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="01-alignment",
        error="softmax inside a window, times a Gaussian around its middle: rows sum to less than one",
    ),
    Mechanism(
        name="hard attention",
        function=hard_attention,
        paper="xu2015",
        exact=False,
        causal="mask",
        time="O(N²D)",
        memory="O(N²)",
        chapter="01-alignment",
        error="one value, drawn with the weights as probabilities; its mean is softmax attention",
    ),
)

MECHANISMS = MappingProxyType({mechanism.function.__name__: mechanism for mechanism in _ALL})
