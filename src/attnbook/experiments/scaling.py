"""A grid of small language models: loss against parameters and training characters."""

from __future__ import annotations

from typing import Any

from attnbook import data
from attnbook.data.text import CharacterText
from attnbook.experiments.grid import Experiment
from attnbook.experiments.language_model import validation_loss
from attnbook.models import Decoder, DecoderConfig
from attnbook.train import fit, token_loss

CONTEXT, BATCH = 64, 8
# (depth, width): from 3 thousand to 0.8 million parameters without embeddings
SHAPES = ((1, 16), (2, 16), (2, 24), (2, 40), (3, 48), (3, 72), (4, 88), (4, 128))
TOKENS = (2**17, 2**18, 2**19, 2**20, 2**21)


def config(depth: int, width: int) -> DecoderConfig:
    """Return the shape of a model: heads of 8 to 36 components, no biases, first weights that fit the width."""
    heads = max(width // 32, 2)
    while width % heads:
        heads -= 1
    return DecoderConfig(65, CONTEXT, width, depth, heads, bias=False, init_std=0.55 / width**0.5)


def flops(depth: int, width: int, tokens: int) -> float:
    """Return the floating-point operations of a run: 6 for each matrix parameter and token, and those of attention.

    Counted are the projections of the blocks, the output projection, and the products of scores and values
    (12 · depth · context · width a token, forward and backward); not counted are norms, softmax and embeddings.
    """
    matrices = 12 * depth * width**2 + 65 * width
    return tokens * (6 * matrices + 12 * depth * CONTEXT * width)


def run(text: CharacterText, *, depth: int, width: int, tokens: int, seed: int) -> dict[str, Any]:
    """Train one model for a number of characters, with a schedule of just that length.

    The peak learning rate falls with width: 0.01 · √(40 / width).
    """
    import torch

    from attnbook.provenance import seed as set_seed

    set_seed(seed)
    model = Decoder(config(depth, width))
    generator = torch.Generator().manual_seed(seed)
    steps = tokens // (CONTEXT * BATCH)
    history = fit(
        model,
        token_loss,
        iter(lambda: text.batch("train", BATCH, CONTEXT, generator), None),
        steps=steps,
        learning_rate=0.01 * (40 / width) ** 0.5,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        schedule="cosine",
        warmup=max(steps // 10, 1),
        final=0.1,
        clip=1.0,
        evaluate=lambda m: validation_loss(m, text, CONTEXT),
    )
    return {
        "parameters": model.config.num_parameters(embeddings=False),
        "all_parameters": model.config.num_parameters(),
        "tokens": steps * CONTEXT * BATCH,
        "flops": flops(depth, width, steps * CONTEXT * BATCH),
        "loss": round(history.evaluations[-1][1], 5),
    }


def measure(**cell: Any) -> dict[str, Any]:
    """Run one cell of the grid."""
    return run(data.load("tinyshakespeare"), **cell)


EXPERIMENT = Experiment(
    "scaling",
    [
        {"depth": depth, "width": width, "tokens": tokens, "seed": seed}
        for seed in range(2)
        for tokens in TOKENS
        for depth, width in SHAPES
    ],
    measure,
)
