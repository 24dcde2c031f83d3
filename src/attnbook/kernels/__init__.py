"""Triton kernels: dense attention and chunked linear attention, forward and backward.

Triton is an optional extra (``pip install 'attnbook[kernels]'``). Nothing imports it by default: the kernels are loaded
when first asked for, and where Triton is missing that raises :class:`MissingTriton`. They run on a GPU; to try them on
a processor, set ``TRITON_INTERPRET=1`` in the environment before Python starts.
"""

from importlib import import_module
from typing import Any

_WHERE = {"triton_attention": "dense", "triton_linear_attention": "linear"}
__all__ = ["MissingTriton", "triton_attention", "triton_linear_attention"]


class MissingTriton(ImportError, RuntimeError):
    """Triton is not installed, or was imported in a way that the kernels cannot use."""


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"attnbook.kernels.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'attnbook.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
