"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.block_sparse import bigbird_attention, block_sparse_attention
from attnbook.mechanisms.documents import document_attention
from attnbook.mechanisms.global_tokens import global_token_attention, longformer_attention
from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.sliding_window import sliding_window_attention, strided_attention
from attnbook.mechanisms.tiled import tiled_attention

__all__ = [
    "bigbird_attention",
    "block_sparse_attention",
    "document_attention",
    "global_token_attention",
    "hard_attention",
    "local_attention",
    "longformer_attention",
    "sliding_window_attention",
    "strided_attention",
    "tiled_attention",
]
