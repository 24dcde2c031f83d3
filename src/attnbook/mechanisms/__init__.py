"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.stored import stored_attention
from attnbook.mechanisms.tiled import tiled_attention

__all__ = ["hard_attention", "local_attention", "stored_attention", "tiled_attention"]
