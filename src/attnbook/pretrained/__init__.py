"""Published weights in our own models."""

from __future__ import annotations

from typing import Any

from attnbook.data.base import Card
from attnbook.pretrained import minilm, smollm2, whisper
from attnbook.shapes import check_choice

_MODULES = {module.CARD.name: module for module in (minilm, smollm2, whisper)}


def names() -> tuple[str, ...]:
    """Return the names of all models, as :func:`load` takes them."""
    return tuple(_MODULES)


def card(name: str) -> Card:
    """Return what one should know of a model before using it.

    Args:
        name: one of :func:`names`.
    Raises:
        ValueError: an unknown name.
    """
    return _MODULES[check_choice("name", name, names())].CARD


def load(name: str) -> tuple[Any, Any]:
    """Load published weights into one of our models, for inference, in float32.

    Args:
        name: "all-MiniLM-L6-v2" (an :class:`attnbook.models.Encoder`), "SmolLM2-135M-Instruct" (an
            :class:`attnbook.models.Decoder`), or "whisper-tiny.en" (an :class:`attnbook.models.SpeechTransformer`).
    Returns:
        The model, and what turns text (or sound) into its inputs and back.
    Raises:
        ValueError: an unknown name, or a file whose content is not what the card says.
        DataUnavailable: the weights are not on this machine and cannot be fetched.
    """
    return _MODULES[check_choice("name", name, names())].load()
