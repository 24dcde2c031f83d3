"""From spelling to sound: recurrent models with and without attention on the CMU Pronouncing Dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attnbook import data
from attnbook.analysis.errors import nearest_reference
from attnbook.data import END, START, Vocabulary, pad_batch, teacher_forcing
from attnbook.data.pronunciation import Pronunciation
from attnbook.experiments.grid import Experiment
from attnbook.models import RNNSeq2Seq, greedy_decode
from attnbook.train import History, fit, sequence_loss


class Task:
    """The dictionary, split and numbered."""

    def __init__(self) -> None:
        self.train = data.load("cmudict", split="train")
        self.test = data.load("cmudict", split="test")
        self.letters = Vocabulary(entry.word for entry in self.train)
        self.phones = Vocabulary(entry.phones for entry in self.train)

    def batches(self, batch_size: int, generator: torch.Generator):
        """Yield random batches without end: source, decoder input, decoder output."""
        while True:
            chosen = torch.randint(len(self.train), (batch_size,), generator=generator).tolist()
            words = [self.train[i] for i in chosen]
            source = pad_batch([self.letters.encode(entry.word) for entry in words])
            yield source, *teacher_forcing([self.phones.encode(entry.phones) for entry in words])


def build(score: str, task: Task, *, width: int = 128) -> RNNSeq2Seq:
    """Build a recurrent model with one of the scores, or with "none".

    Args:
        score: as for :class:`attnbook.models.RNNSeq2Seq`.
        task: for the vocabularies.
        width: of the model.
    """
    return RNNSeq2Seq(len(task.letters), len(task.phones), width, score=score, dropout=0.1)


def train(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> History:
    """Train with AdamW, warm-up and cosine decay.

    Args:
        model: trained in place.
        task: the dictionary.
        steps: how many updates.
        batch_size: words a step.
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
        warmup=min(100, steps // 10),
        clip=1.0,
    )


def pronounce(model: nn.Module, task: Task, words: Sequence[str]) -> list[list[str]]:
    """Return the phones that the model produces for each word, greedily.

    Args:
        model: trained.
        task: its numbering.
        words: of any letters.
    """
    found: list[list[str]] = []
    for i in range(0, len(words), 1024):
        source = pad_batch([task.letters.encode(word) for word in words[i : i + 1024]])
        tokens = greedy_decode(model, source, start=START, end=END, max_length=40)
        found += [task.phones.decode(row) for row in tokens.tolist()]
    return found


def score_by_length(model: nn.Module, task: Task, entries: Sequence[Pronunciation]) -> dict[str, list[int]]:
    """Count, for each length of word: words, words right, edits, and phones of the nearest reference.

    Args:
        model: trained.
        task: its numbering.
        entries: words with their true pronunciations.
    """
    table: dict[int, list[int]] = {}
    for entry, found in zip(entries, pronounce(model, task, [entry.word for entry in entries]), strict=True):
        edits, phones = nearest_reference(tuple(found), (entry.phones, *entry.others))
        row = table.setdefault(len(entry.word), [0, 0, 0, 0])
        for i, amount in enumerate((1, int(edits == 0), edits, phones)):
            row[i] += amount
    return {str(length): row for length, row in sorted(table.items())}


def measure(*, score: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one model; return its errors by length of word.

    Args:
        score: as for :func:`build`.
        steps: as for :func:`train`.
        seed: of weights and batches.
    """
    from attnbook.provenance import seed as set_seed

    set_seed(seed)
    task = Task()
    model = build(score, task)
    history = train(model, task, steps=steps, seed=seed)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "final_loss": round(sum(history.losses[-100:]) / 100, 5),
        "by_length": score_by_length(model, task, task.test),
    }


EXPERIMENT = Experiment(
    "pronunciation",
    [
        {"score": score, "steps": 4000, "seed": seed}
        for score in ("none", "additive", "dot", "general", "concat")
        for seed in range(3)
    ],
    measure,
)
