"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.a3 import a3_attention
from attnbook.mechanisms.block_sparse import bigbird_attention, block_sparse_attention
from attnbook.mechanisms.correspondence import convolutional_spatial_transformer, soft_match
from attnbook.mechanisms.cosformer import cosformer_attention
from attnbook.mechanisms.data_informed import data_informed_attention
from attnbook.mechanisms.delta_rule import delta_rule_attention
from attnbook.mechanisms.documents import document_attention
from attnbook.mechanisms.galerkin import fourier_attention, galerkin_attention
from attnbook.mechanisms.gated_linear import gated_linear_attention
from attnbook.mechanisms.global_tokens import global_token_attention, longformer_attention
from attnbook.mechanisms.graph import graph_attention, graph_attention_v2
from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.hopfield import hopfield_retrieve
from attnbook.mechanisms.induced import induced_set_attention, perceiver_attention
from attnbook.mechanisms.latent import latent_attention
from attnbook.mechanisms.linear import linear_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.low_rank import linformer_attention, nystrom_attention
from attnbook.mechanisms.lsh import lsh_attention
from attnbook.mechanisms.random_features import performer_attention, random_feature_attention
from attnbook.mechanisms.relative import (
    alibi_attention,
    disentangled_attention,
    music_attention,
    rotary_attention,
    shaw_attention,
    t5_attention,
    transformer_xl_attention,
)
from attnbook.mechanisms.routing import routing_attention
from attnbook.mechanisms.sliding_window import sliding_window_attention, strided_attention
from attnbook.mechanisms.ssd import retention_attention, ssd_attention
from attnbook.mechanisms.stored import stored_attention
from attnbook.mechanisms.tiled import tiled_attention
from attnbook.mechanisms.topk import topk_attention

__all__ = [
    "a3_attention",
    "alibi_attention",
    "bigbird_attention",
    "block_sparse_attention",
    "convolutional_spatial_transformer",
    "cosformer_attention",
    "data_informed_attention",
    "delta_rule_attention",
    "disentangled_attention",
    "document_attention",
    "fourier_attention",
    "galerkin_attention",
    "gated_linear_attention",
    "global_token_attention",
    "graph_attention",
    "graph_attention_v2",
    "hard_attention",
    "hopfield_retrieve",
    "induced_set_attention",
    "latent_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "longformer_attention",
    "lsh_attention",
    "music_attention",
    "nystrom_attention",
    "perceiver_attention",
    "performer_attention",
    "random_feature_attention",
    "retention_attention",
    "rotary_attention",
    "routing_attention",
    "shaw_attention",
    "sliding_window_attention",
    "soft_match",
    "ssd_attention",
    "stored_attention",
    "strided_attention",
    "t5_attention",
    "tiled_attention",
    "topk_attention",
    "transformer_xl_attention",
]
