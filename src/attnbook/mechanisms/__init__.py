"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.tiled import tiled_attention

__all__ = ["tiled_attention"]
