"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.delta_rule import delta_rule_attention
from attnbook.mechanisms.gated_linear import gated_linear_attention
from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.ssd import retention_attention, ssd_attention
from attnbook.mechanisms.tiled import tiled_attention

__all__ = [
    "delta_rule_attention",
    "gated_linear_attention",
    "hard_attention",
    "local_attention",
    "retention_attention",
    "ssd_attention",
    "tiled_attention",
]
