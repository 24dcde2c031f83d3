"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.a3 import a3_attention
from attnbook.mechanisms.data_informed import data_informed_attention
from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.lsh import lsh_attention
from attnbook.mechanisms.routing import routing_attention
from attnbook.mechanisms.tiled import tiled_attention
from attnbook.mechanisms.topk import topk_attention

__all__ = [
    "a3_attention",
    "data_informed_attention",
    "hard_attention",
    "local_attention",
    "lsh_attention",
    "routing_attention",
    "tiled_attention",
    "topk_attention",
]
