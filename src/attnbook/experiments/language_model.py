"""Character models of tinyshakespeare: nanoGPT's setting for a laptop, an LSTM beside it, and longer runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnbook import data
from attnbook.data.text import CharacterText
from attnbook.experiments.grid import Experiment
from attnbook.models import Decoder, DecoderConfig, LSTMLanguageModel
from attnbook.train import History, fit, token_loss
from attnbook.train.batches import validation_loss, windows

# nanoGPT's README: block_size 64, batch_size 12, 4 layers, 4 heads, width 128, 2,000 iterations, no dropout, no biases.
NANO = {"depth": 4, "width": 128, "context": 64, "batch_size": 12, "steps": 2000, "dropout": 0.0}
LARGER = {"depth": 6, "width": 192, "context": 256, "batch_size": 16, "steps": 3000, "dropout": 0.1}


@torch.no_grad()
def loss_by_position(model: nn.Module, text: CharacterText, context: int) -> list[float]:
    """Return the mean loss at each position of the validation windows: what more context is worth.

    Args:
        model: maps tokens to logits.
        text: its validation part is scored.
        context: length of a window.
    """
    device = next(model.parameters()).device
    model.eval()
    total, count = torch.zeros(context), 0
    for inputs, targets in windows(text, context):
        logits = model(inputs.to(device)).transpose(1, 2)
        total += nn.functional.cross_entropy(logits, targets.to(device), reduction="none").sum(0).cpu()
        count += len(inputs)
    return [round(x, 4) for x in (total / count).tolist()]


def build(model: str, text: CharacterText, *, depth: int, width: int, context: int, dropout: float) -> nn.Module:
    """Build a GPT (one head for each 32 components), or an LSTM.

    Args:
        model: "gpt" or "lstm".
        text: for its characters.
        depth: blocks or layers.
        width: of the model.
        context: the most positions of the GPT.
        dropout: in training.
    """
    if model == "gpt":
        return Decoder(
            DecoderConfig(len(text.characters), context, width, depth, max(width // 32, 1), bias=False, dropout=dropout)
        )
    return LSTMLanguageModel(len(text.characters), width, depth=depth, dropout=dropout)


def train(
    model: nn.Module,
    text: CharacterText,
    *,
    context: int,
    batch_size: int,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    stop: int | None = None,
    evaluate_every: int = 250,
) -> History:
    """Train in nanoGPT's manner: AdamW, β₂ = 0.99, decay 0.1, 100 steps of warm-up, cosine to a tenth, clipping at 1.

    Args:
        model: trained in place.
        text: on its first 90 %.
        context: length of a window.
        batch_size: windows a step.
        steps: length of the schedule.
        learning_rate: the peak.
        seed: of the windows.
        stop: take only so many steps of the schedule; all by default.
        evaluate_every: steps between validation losses.
    """
    generator = torch.Generator().manual_seed(seed)
    from attnbook.train import schedule

    return fit(
        model,
        token_loss,
        iter(lambda: text.batch("train", batch_size, context, generator), None),
        steps=stop or steps,
        learning_rate=learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        schedule=schedule("cosine", steps=steps, warmup=100, final=0.1),
        clip=1.0,
        evaluate=lambda m: validation_loss(m, text, context),
        evaluate_every=evaluate_every,
    )


def measure(*, model: str, learning_rate: float, seed: int, **shape: Any) -> dict[str, Any]:
    """Train one model; return its curve, its size, and text that it wrote.

    Args:
        model: as for :func:`build`.
        learning_rate: the peak.
        seed: of weights, windows and sample.
        shape: what else :func:`build` and :func:`train` take.
    """
    from attnbook.models import generate
    from attnbook.provenance import seed as set_seed

    set_seed(seed)
    text = data.load("tinyshakespeare")
    run = {name: shape.pop(name) for name in ("batch_size", "steps")}
    net = build(model, text, **shape)
    history = train(net, text, context=shape["context"], learning_rate=learning_rate, seed=seed, **run)
    prompt = text.encode("\n")[None].to(next(net.parameters()).device)
    sample = generate(net, prompt, max_new_tokens=500, generator=torch.Generator(prompt.device).manual_seed(seed))
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "validation": [[step, round(loss, 5)] for step, loss in history.evaluations],
        "train": [round(sum(history.losses[i : i + 50]) / 50, 4) for i in range(0, len(history.losses), 50)],
        "by_position": loss_by_position(net, text, shape["context"]),
        "sample": text.decode(sample[0, 1:].cpu()),
    }


# Two layers of these widths have as many parameters as the GPTs, to a few thousandths.
_LSTM, _LARGER_LSTM = {**NANO, "depth": 2, "width": 222}, {**LARGER, "depth": 2, "width": 408}
EXPERIMENT = Experiment(
    "language-model",
    [
        *({"model": "gpt", "learning_rate": 1e-3, "seed": seed, **NANO} for seed in range(3)),
        *({"model": "gpt", "learning_rate": rate, "seed": 0, **NANO} for rate in (2e-3, 4e-3, 8e-3)),
        *({"model": "gpt", "learning_rate": 4e-3, "seed": seed, **NANO} for seed in (1, 2)),
        *({"model": "lstm", "learning_rate": rate, "seed": 0, **_LSTM} for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)),
        *({"model": "lstm", "learning_rate": 8e-3, "seed": seed, **_LSTM} for seed in (1, 2)),
        {"model": "gpt", "learning_rate": 2e-3, "seed": 0, **LARGER},
        {"model": "lstm", "learning_rate": 4e-3, "seed": 0, **_LARGER_LSTM},
    ],
    measure,
)
