"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.graph import graph_attention, graph_attention_v2
from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.tiled import tiled_attention

__all__ = ["graph_attention", "graph_attention_v2", "hard_attention", "local_attention", "tiled_attention"]
