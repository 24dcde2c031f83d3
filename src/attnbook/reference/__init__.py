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
from attnbook.reference.selective import (
    a3_attention,
    data_informed_attention,
    lsh_attention,
    routing_attention,
    topk_attention,
)

__all__ = [
    "NORMALIZERS",
    "a3_attention",
    "attention",
    "attention_gradients",
    "data_informed_attention",
    "entmax",
    "local_attention",
    "lsh_attention",
    "routing_attention",
    "scalable_softmax",
    "sigmoid",
    "softmax",
    "softmax_off_by_one",
    "sparsemax",
    "topk_attention",
]
