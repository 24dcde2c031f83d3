"""attnbook: the library of *Attention Mechanisms in Neural Networks: an executable monograph*."""

from importlib import import_module
from typing import Any

from attnbook import claims, masks, mechanisms, normalizers, positions, reference, scores
from attnbook.functional import attention

__version__ = "0.1.0"
__all__ = ["attention", "claims", "masks", "mechanisms", "normalizers", "positions", "reference", "scores"]

# Imported when first asked for, so that `import attnbook` stays quick.
_LATER = (
    "analysis",
    "bench",
    "cache",
    "catalog",
    "data",
    "exercises",
    "experiments",
    "figures",
    "functional",
    "kernels",
    "layers",
    "measure",
    "models",
    "pretrained",
    "provenance",
    "shapes",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return import_module(f"attnbook.{name}")
    raise AttributeError(f"module 'attnbook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
