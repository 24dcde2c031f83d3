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
from attnbook.reference.sparse import (
    bigbird_attention,
    block_sparse_attention,
    document_attention,
    global_token_attention,
    longformer_attention,
    sliding_window_attention,
    strided_attention,
)
from attnbook.reference.state import delta_rule_attention, gated_linear_attention, retention_attention, ssd_attention
from attnbook.reference.structured import (
    alibi_attention,
    convolutional_spatial_transformer,
    disentangled_attention,
    hopfield_energy,
    hopfield_retrieve,
    induced_set_attention,
    latent_attention,
    music_attention,
    perceiver_attention,
    rotary_attention,
    shaw_attention,
    soft_match,
    t5_attention,
    transformer_xl_attention,
)

__all__ = [
    "NORMALIZERS",
    "a3_attention",
    "alibi_attention",
    "attention",
    "attention_gradients",
    "bigbird_attention",
    "block_sparse_attention",
    "convolutional_spatial_transformer",
    "data_informed_attention",
    "delta_rule_attention",
    "disentangled_attention",
    "document_attention",
    "entmax",
    "gated_linear_attention",
    "global_token_attention",
    "hopfield_energy",
    "hopfield_retrieve",
    "induced_set_attention",
    "latent_attention",
    "local_attention",
    "longformer_attention",
    "lsh_attention",
    "music_attention",
    "perceiver_attention",
    "retention_attention",
    "rotary_attention",
    "routing_attention",
    "scalable_softmax",
    "shaw_attention",
    "sigmoid",
    "sliding_window_attention",
    "soft_match",
    "softmax",
    "softmax_off_by_one",
    "sparsemax",
    "ssd_attention",
    "strided_attention",
    "t5_attention",
    "topk_attention",
    "transformer_xl_attention",
]
