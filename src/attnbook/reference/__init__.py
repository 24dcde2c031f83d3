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
from attnbook.reference.linear import (
    cosformer_attention,
    fourier_attention,
    galerkin_attention,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    performer_attention,
    random_feature_attention,
)

__all__ = [
    "NORMALIZERS",
    "attention",
    "attention_gradients",
    "cosformer_attention",
    "entmax",
    "fourier_attention",
    "galerkin_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "nystrom_attention",
    "performer_attention",
    "random_feature_attention",
    "scalable_softmax",
    "sigmoid",
    "softmax",
    "softmax_off_by_one",
    "sparsemax",
]
