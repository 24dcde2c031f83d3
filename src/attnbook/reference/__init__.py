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
from attnbook.reference.sparse import (
    bigbird_attention,
    block_sparse_attention,
    document_attention,
    global_token_attention,
    longformer_attention,
    sliding_window_attention,
    strided_attention,
)

__all__ = [
    "NORMALIZERS",
    "attention",
    "attention_gradients",
    "bigbird_attention",
    "block_sparse_attention",
    "document_attention",
    "entmax",
    "global_token_attention",
    "local_attention",
    "longformer_attention",
    "scalable_softmax",
    "sigmoid",
    "sliding_window_attention",
    "softmax",
    "softmax_off_by_one",
    "sparsemax",
    "strided_attention",
]
