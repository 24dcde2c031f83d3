"""SCAN: a recurrent model with attention and a Transformer on the simple, length and jump splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbook import data
from attnbook.data import END, START, Vocabulary, pad_batch, teacher_forcing
from attnbook.experiments.grid import Experiment
from attnbook.models import RNNSeq2Seq, Transformer, greedy_decode
from attnbook.train import History, fit, sequence_loss

Pair = tuple[tuple[str, ...], tuple[str, ...]]


class Task:
    """One split of SCAN, numbered.

    Args:
        split: as for the loader.
    """

    def __init__(self, split: str):
        self.train = data.load("scan", split=split, part="train")
        self.test = data.load("scan", split=split, part="test")
        everything = data.load("scan")
        self.source = Vocabulary(command for command, _ in everything)
        self.target = Vocabulary(actions for _, actions in everything)

    def batches(self, batch_size: int, generator: torch.Generator):
        """Yield random batches without end: source, decoder input, decoder output."""
        sources = [self.source.encode(command) for command, _ in self.train]
        targets = [self.target.encode(actions) for _, actions in self.train]
        while True:
            chosen = torch.randint(len(sources), (batch_size,), generator=generator).tolist()
            yield pad_batch([sources[i] for i in chosen]), *teacher_forcing([targets[i] for i in chosen])


def build(
    model: str,
    task: Task,
    *,
    position: str = "sinusoidal",
    dropout: float = 0.1,
    width: int | None = None,
    depth: int = 2,
) -> nn.Module:
    """Build "rnn" (GRU with Luong's general score, width 200) or "transformer" (2 + 2 blocks, width 128).

    Args:
        model: which of the two.
        task: for the vocabularies.
        position: the Transformer's positions.
        dropout: in training.
        width: 200 or 128 by default.
        depth: the Transformer's blocks on either side.
    """
    vocabularies = len(task.source), len(task.target)
    if model == "rnn":
        return RNNSeq2Seq(*vocabularies, width or 200, score="general", dropout=dropout)
    width = width or 128
    return Transformer(
        *vocabularies, width, depth, 4, hidden=2 * width, max_length=64, position=position, dropout=dropout
    )


def train(
    model: nn.Module, task: Task, *, steps: int, batch_size: int = 64, learning_rate: float = 1e-3, seed: int = 0
) -> History:
    """Train with AdamW, warm-up and cosine decay.

    Args:
        model: trained in place.
        task: the split.
        steps: how many updates.
        batch_size: commands a step.
        learning_rate: the peak.
        seed: of the batches.
    """
    return fit(
        model,
        sequence_loss(),
        task.batches(batch_size, torch.Generator().manual_seed(seed)),
        steps=steps,
        learning_rate=learning_rate,
        schedule="cosine",
        warmup=min(200, steps // 10),
        clip=1.0,
    )


@torch.no_grad()
def decode_to_length(model: nn.Module, source: Tensor, lengths: list[int]) -> Tensor:
    """Decode greedily, with an oracle for the length: the end is forbidden before the true one and forced there.

    Args:
        model: trained.
        source: (B, S) integers, padded.
        lengths: of each true target, without its end.
    """
    model.eval()
    state = model.encode(source)
    token = source.new_full((len(source),), START)
    wanted, produced = torch.tensor(lengths), []
    for step in range(max(lengths)):
        logits, state = model.decode_step(token, state)
        logits[:, END] = float("-inf")
        token = logits.argmax(-1).masked_fill(wanted <= step, END)
        produced.append(token)
    model.train()
    return torch.stack(produced, 1)


def predictions(model: nn.Module, task: Task, pairs: list[Pair], *, oracle: bool = False) -> list[list[str]]:
    """Return the actions that the model produces for each command, greedily.

    Args:
        model: trained.
        task: its numbering.
        pairs: commands with their true actions.
        oracle: tell the model the true lengths.
    """
    found: list[list[str]] = []
    for i in range(0, len(pairs), 512):
        part = pairs[i : i + 512]
        source = pad_batch([task.source.encode(command) for command, _ in part])
        if oracle:
            tokens = decode_to_length(model, source, [len(actions) for _, actions in part])
        else:
            tokens = greedy_decode(model, source, start=START, end=END, max_length=50)
        found += [task.target.decode(row) for row in tokens.tolist()]
    return found


def score(model: nn.Module, task: Task, pairs: list[Pair], *, oracle: bool = False) -> dict[str, Any]:
    """Return the share of commands whose whole action sequence is right, in all and by the sequence's length.

    Args:
        model: trained.
        task: its numbering.
        pairs: commands with their true actions.
        oracle: tell the model the true lengths.
    """
    right: dict[int, list[bool]] = {}
    for (_, actions), found in zip(pairs, predictions(model, task, pairs, oracle=oracle), strict=True):
        right.setdefault(len(actions), []).append(tuple(found) == actions)
    everything = [hit for hits in right.values() for hit in hits]
    return {
        "accuracy": sum(everything) / len(everything),
        "by_length": {str(length): [sum(hits), len(hits)] for length, hits in sorted(right.items())},
    }


def measure(*, model: str, split: str, position: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one model on one split; return its accuracies.

    Args:
        model: as for :func:`build`.
        split: as for :class:`Task`.
        position: as for :func:`build`.
        steps: as for :func:`train`.
        seed: of weights and batches.
    """
    from attnbook.provenance import seed as set_seed

    set_seed(seed)
    task = Task(split)
    net = build(model, task, position=position)
    history = train(net, task, steps=steps, seed=seed)
    known = task.train[:: max(1, len(task.train) // 1000)]
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "final_loss": round(sum(history.losses[-100:]) / 100, 6),
        "train": score(net, task, known)["accuracy"],
        "test": score(net, task, task.test),
        "oracle": score(net, task, task.test, oracle=True)["accuracy"],
    }


EXPERIMENT = Experiment(
    "scan",
    [
        {"model": model, "split": split, "position": position, "steps": 4000, "seed": seed}
        for model, position in (("rnn", "none"), ("transformer", "sinusoidal"))
        for split in ("simple", "length", "jump")
        for seed in range(3)
    ]
    + [
        {"model": "transformer", "split": "length", "position": position, "steps": 4000, "seed": seed}
        for position in ("rotary", "none")
        for seed in range(3)
    ],
    measure,
)
