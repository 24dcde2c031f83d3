"""A grid of small language models: loss against parameters and training characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from attnbook import data
from attnbook.data.chinchilla import Runs
from attnbook.data.text import CharacterText
from attnbook.experiments.grid import Experiment
from attnbook.experiments.language_model import validation_loss
from attnbook.models import Decoder, DecoderConfig
from attnbook.train import fit, token_loss

CONTEXT, BATCH = 64, 8
# (depth, width): from 3 thousand to 0.8 million parameters without embeddings
SHAPES = ((1, 16), (2, 16), (2, 24), (2, 40), (3, 48), (3, 72), (4, 88), (4, 128))
TOKENS = (2**17, 2**18, 2**19, 2**20, 2**21)
# Longer runs of the smaller shapes, so that the best size of a budget is not always the smallest that can spend it.
LONGER = [(shape, 2**22) for shape in SHAPES[:5]]


def config(depth: int, width: int) -> DecoderConfig:
    """Return the shape of a model: heads of 8 to 44 components, no biases, first weights that fit the width.

    Args:
        depth: number of blocks.
        width: of the model.
    """
    heads = max(width // 32, 2)
    while width % heads:
        heads -= 1
    return DecoderConfig(65, CONTEXT, width, depth, heads, bias=False, init_std=0.55 / width**0.5)


def flops(depth: int, width: int, tokens: int) -> float:
    """Return the floating-point operations of a run: 6 for each matrix parameter and token, and those of attention.

    Counted are the projections of the blocks, the output projection, and the products of scores and values
    (12 · depth · context · width a token, forward and backward); not counted are norms, softmax and embeddings.

    Args:
        depth: number of blocks.
        width: of the model.
        tokens: characters trained on.
    """
    matrices = 12 * depth * width**2 + 65 * width
    return tokens * (6 * matrices + 12 * depth * CONTEXT * width)


def run(text: CharacterText, *, depth: int, width: int, tokens: int, seed: int, evaluations: int = 1) -> dict[str, Any]:
    """Train one model for a number of characters, with a schedule of just that length.

    The peak learning rate falls with width: 0.01 · √(40 / width).

    Args:
        text: trained on its first 90 %.
        depth: number of blocks.
        width: of the model.
        tokens: characters to train on.
        seed: of weights and windows.
        evaluations: how often the validation loss is taken, evenly, the last time at the end.
    Returns:
        Parameters without and with embeddings, characters, operations, the final loss; with several evaluations also
        "curve": (characters, loss) along the way, on a schedule that was not made to end there.
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
        evaluate_every=max(steps // evaluations, 1),
    )
    outcome = {
        "parameters": model.config.num_parameters(embeddings=False),
        "all_parameters": model.config.num_parameters(),
        "tokens": steps * CONTEXT * BATCH,
        "flops": flops(depth, width, steps * CONTEXT * BATCH),
        "loss": round(history.evaluations[-1][1], 5),
    }
    if evaluations > 1:
        outcome["curve"] = [(step * CONTEXT * BATCH, round(loss, 5)) for step, loss in history.evaluations]
    return outcome


def as_runs(outcomes: Iterable[dict[str, Any]], *, embeddings: bool = False, simple: bool = False) -> Runs:
    """Collect outcomes for the fits of :mod:`attnbook.analysis.scaling`.

    Args:
        outcomes: of :func:`run`.
        embeddings: count the embeddings among the parameters.
        simple: take 6ND for the compute, with those parameters, instead of the operations counted by :func:`flops`.
    Returns:
        Columns of parameters, tokens, compute and loss.
    """
    name = "all_parameters" if embeddings else "parameters"
    rows = [(o[name], o["tokens"], 6 * o[name] * o["tokens"] if simple else o["flops"], o["loss"]) for o in outcomes]
    return Runs(*np.array(rows, dtype=float).reshape(-1, 4).T)


def measure(**cell: Any) -> dict[str, Any]:
    """Run one cell of the grid.

    Args:
        cell: as for :func:`run`.
    """
    return run(data.load("tinyshakespeare"), **cell)


EXPERIMENT = Experiment(
    "scaling",
    [
        {"depth": depth, "width": width, "tokens": tokens, "seed": seed}
        for seed in range(2)
        for (depth, width), tokens in [(shape, tokens) for tokens in TOKENS for shape in SHAPES] + LONGER
    ],
    measure,
)
