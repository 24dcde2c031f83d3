"""Normalisers: functions from scores to attention weights.

Each is called as ``normalizer(scores, *, mask=None, dim=-1, …)``. A score of −∞ and a position where the mask is False
mean the same: no weight there. A row with nothing left gets zero weights and sends no gradient back, in every
normaliser and dtype.
"""

from attnbook.normalizers.common import Normalizer
from attnbook.normalizers.smooth import adaptive_temperature, scalable_softmax, sigmoid, softmax, softmax_off_by_one
from attnbook.normalizers.sparse import asentmax, entmax, entmax15, sparsemax
from attnbook.shapes import check_choice

__all__ = [
    "NORMALIZERS",
    "Normalizer",
    "adaptive_temperature",
    "asentmax",
    "entmax",
    "entmax15",
    "resolve",
    "scalable_softmax",
    "sigmoid",
    "softmax",
    "softmax_off_by_one",
    "sparsemax",
]

NORMALIZERS: dict[str, Normalizer] = {
    "softmax": softmax,
    "softmax_off_by_one": softmax_off_by_one,
    "scalable_softmax": scalable_softmax,
    "adaptive_temperature": adaptive_temperature,
    "sigmoid": sigmoid,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax": entmax,
    "asentmax": asentmax,
}


def resolve(normalizer: str | Normalizer) -> Normalizer:
    """Return the normaliser of that name, or the callable itself.

    Args:
        normalizer: a name, or a function called as ``(scores, *, mask) -> weights``.
    Raises:
        ValueError: a name that is not in ``NORMALIZERS``.
    """
    if callable(normalizer):
        return normalizer
    return NORMALIZERS[check_choice("normalizer", normalizer, tuple(NORMALIZERS))]
