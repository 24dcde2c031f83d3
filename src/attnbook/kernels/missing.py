"""What is said where Triton cannot be had."""

from __future__ import annotations


class MissingTriton(ImportError, RuntimeError):
    """Triton is not installed, or was imported in a way that the kernels cannot use."""
