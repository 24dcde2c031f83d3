"""The specification: every mechanism in NumPy, float64, as its formula is written.

Nothing here is shared with the rest of the library, and nothing is clever: the other forms are tested against these
functions, which take the same arguments.
"""

from attnbook.reference.dense import (
    NORMALIZERS,
    attention,
    attention_gradients,
    entmax,
    local_attention,
    scalable_softmax,
    sigmoid,
    softmax,
    softmax_off_by_one,
    sparsemax,
)
from attnbook.reference.graph import graph_attention, graph_attention_v2

__all__ = [
    "NORMALIZERS",
    "attention",
    "attention_gradients",
    "entmax",
    "graph_attention",
    "graph_attention_v2",
    "local_attention",
    "scalable_softmax",
    "sigmoid",
    "softmax",
    "softmax_off_by_one",
    "sparsemax",
]
