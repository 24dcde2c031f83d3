"""Attention mechanisms: one, or one close family, a file; functions over (B, H, L, D)."""

from attnbook.mechanisms.cosformer import cosformer_attention
from attnbook.mechanisms.galerkin import fourier_attention, galerkin_attention
from attnbook.mechanisms.hard import hard_attention
from attnbook.mechanisms.linear import linear_attention
from attnbook.mechanisms.local import local_attention
from attnbook.mechanisms.low_rank import linformer_attention, nystrom_attention
from attnbook.mechanisms.random_features import performer_attention, random_feature_attention
from attnbook.mechanisms.tiled import tiled_attention

__all__ = [
    "cosformer_attention",
    "fourier_attention",
    "galerkin_attention",
    "hard_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "nystrom_attention",
    "performer_attention",
    "random_feature_attention",
    "tiled_attention",
]
