"""nanoGPT's model as a peer. It is no package: its ``model.py`` is read from where the user has it."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torch import nn

from attnbook.models import DecoderConfig
from attnbook.shapes import mismatch

NAME = "nanoGPT"


def build(path: str | Path, config: DecoderConfig) -> nn.Module:
    """Make nanoGPT's GPT in the shape of a decoder in GPT-2's manner, weights at random.

    Args:
        path: ``model.py`` of karpathy/nanoGPT, or the folder that holds it; it is executed.
        config: the shape.
    Raises:
        ValueError: no such file, or one without ``GPT`` and ``GPTConfig``.
    """
    file = Path(path) / "model.py" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise mismatch("nanogpt", "nanoGPT's model.py, or the folder that holds it", str(path))
    spec = spec_from_file_location("_nanogpt_model", file)
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise mismatch("nanogpt", "a model.py with GPT and GPTConfig", str(path))
    settings = module.GPTConfig(
        block_size=config.context_length,
        vocab_size=config.vocab_size,
        n_layer=config.depth,
        n_head=config.num_heads,
        n_embd=config.width,
        dropout=config.dropout,
        bias=config.bias,
    )
    return module.GPT(settings)


def left_out(suite: str) -> None:
    """Say that a suite has no lines against nanoGPT, and how to have them.

    Args:
        suite: its name.
    """
    print(f"{suite}: {NAME} is left out; --nanogpt PATH says where its model.py is")
