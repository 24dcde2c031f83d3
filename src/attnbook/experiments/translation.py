"""English to French captions: recurrent models with and without attention, by the length of the sentence."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from attnbook import data
from attnbook.data import END, START, Vocabulary, pad_batch, teacher_forcing
from attnbook.experiments.grid import Experiment
from attnbook.models import RNNSeq2Seq, greedy_decode
from attnbook.train import History, fit, sequence_loss


def words(sentence: str) -> list[str]:
    """Cut a sentence into lower-case words and punctuation marks.

    Args:
        sentence: in any language that puts spaces between words.
    """
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


class Task:
    """Multi30k from English to French, cut into words and numbered; words seen once are unknown."""

    def __init__(self) -> None:
        load = lambda split: [  # noqa: E731
            tuple(map(words, pair)) for pair in data.load("multi30k", source="en", target="fr", split=split)
        ]
        self.train, self.test = load("train"), load("test")
        self.english = Vocabulary((pair[0] for pair in self.train), min_count=2)
        self.french = Vocabulary((pair[1] for pair in self.train), min_count=2)

    def batches(self, batch_size: int, generator: torch.Generator):
        """Yield batches without end; sentences of like length go together, the batches in random order."""
        order = sorted(self.train, key=lambda pair: (len(pair[1]), len(pair[0])))
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        while True:
            for i in torch.randperm(len(groups), generator=generator).tolist():
                source = pad_batch([self.english.encode(pair[0]) for pair in groups[i]])
                yield source, *teacher_forcing([self.french.encode(pair[1]) for pair in groups[i]])


def build(score: str, task: Task, *, width: int = 192) -> RNNSeq2Seq:
    """Build a recurrent model with one of the scores, or with "none".

    Args:
        score: as for :class:`attnbook.models.RNNSeq2Seq`.
        task: for the vocabularies.
        width: of the model.
    """
    return RNNSeq2Seq(len(task.english), len(task.french), width, score=score, dropout=0.2)


def train(model: nn.Module, task: Task, *, steps: int, batch_size: int = 64, seed: int = 0) -> History:
    """Train with AdamW at 2 · 10⁻³, warm-up and cosine decay.

    Args:
        model: trained in place.
        task: the captions.
        steps: how many updates.
        batch_size: captions a step.
        seed: of the batches.
    """
    return fit(
        model,
        sequence_loss(),
        task.batches(batch_size, torch.Generator().manual_seed(seed)),
        steps=steps,
        learning_rate=2e-3,
        schedule="cosine",
        warmup=min(100, steps // 10),
        clip=1.0,
    )


def translate(model: nn.Module, task: Task, sentences: list[list[str]]) -> list[list[str]]:
    """Translate greedily.

    Args:
        model: trained.
        task: its numbering.
        sentences: English words.
    """
    found: list[list[str]] = []
    for i in range(0, len(sentences), 200):
        source = pad_batch([task.english.encode(sentence) for sentence in sentences[i : i + 200]])
        tokens = greedy_decode(model, source, start=START, end=END, max_length=60)
        found += [task.french.decode(row) for row in tokens.tolist()]
    return found


def measure(*, score: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one model; return its translations of the test set, from which any score can be computed.

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
    found = translate(model, task, [pair[0] for pair in task.test])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "final_loss": round(sum(history.losses[-100:]) / 100, 4),
        "translations": [" ".join(sentence) for sentence in found],
    }


EXPERIMENT = Experiment(
    "translation",
    [{"score": score, "steps": 2250, "seed": seed} for score in ("none", "additive") for seed in range(3)],
    measure,
)
