"""Greek to English: does the attention of a translation model align words as people do?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbook import data
from attnbook.analysis.alignment import from_weights, scores
from attnbook.data import Vocabulary, pad_batch, teacher_forcing
from attnbook.data.alignments import AlignedVerse
from attnbook.experiments.grid import Experiment
from attnbook.models import RNNSeq2Seq
from attnbook.train import History, fit, sequence_loss


class Task:
    """The verses, numbered; Greek words in their dictionary forms."""

    def __init__(self) -> None:
        self.verses = data.load("bible-alignments", greek="lemma")
        self.greek = Vocabulary((verse.greek for verse in self.verses), min_count=2)
        self.english = Vocabulary((verse.english for verse in self.verses), min_count=2)

    def batch(self, verses: list[AlignedVerse]) -> tuple[Tensor, Tensor, Tensor]:
        """Return source, decoder input and decoder output of some verses."""
        source = pad_batch([self.greek.encode(verse.greek) for verse in verses])
        return source, *teacher_forcing([self.english.encode(verse.english) for verse in verses])

    def batches(self, batch_size: int, generator: torch.Generator):
        """Yield batches without end; verses of like length go together, the batches in random order."""
        order = sorted(self.verses, key=lambda verse: len(verse.english))
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        while True:
            for i in torch.randperm(len(groups), generator=generator).tolist():
                yield self.batch(groups[i])


def build(score: str, task: Task, *, width: int = 192) -> RNNSeq2Seq:
    """Build a recurrent model with one of the scores.

    Args:
        score: as for :class:`attnbook.models.RNNSeq2Seq`.
        task: for the vocabularies.
        width: of the model.
    """
    return RNNSeq2Seq(len(task.greek), len(task.english), width, score=score, dropout=0.2)


def train(model: nn.Module, task: Task, *, steps: int, batch_size: int = 32, seed: int = 0) -> History:
    """Train with AdamW at 2 · 10⁻³, warm-up and cosine decay.

    Args:
        model: trained in place.
        task: the verses.
        steps: how many updates.
        batch_size: verses a step.
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


@torch.no_grad()
def attention_of(model: RNNSeq2Seq, task: Task, verses: list[AlignedVerse], *, shift: int = 0) -> list[Tensor]:
    """Return the weights (T, S) of each verse while its true translation is read off.

    Args:
        model: trained.
        task: its numbering.
        verses: of any length.
        shift: 0 takes the weights of the step that produces each word; 1 those of the step after, which has read it.
    """
    model.eval()
    found: list[Tensor] = []
    for i in range(0, len(verses), 64):
        part = verses[i : i + 64]
        source, inputs, _ = task.batch(part)
        _, weights = model.forward_with_weights(source, inputs)
        for verse, rows in zip(part, weights, strict=True):
            found.append(rows[shift : shift + len(verse.english), : len(verse.greek)])
    model.train()
    return found


def measure(*, score: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one model on all verses, without a look at the alignments; return how its attention agrees with them.

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
    gold = [verse.links for verse in task.verses]
    outcome: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "final_loss": round(sum(history.losses[-100:]) / 100, 4),
    }
    for shift in (0, 1):
        weights = attention_of(model, task, task.verses, shift=shift)
        outcome[f"shift_{shift}"] = scores([from_weights(w) for w in weights], gold)
        if shift == 0 and seed == 0:
            shown = next(i for i, verse in enumerate(task.verses) if verse.id == "43001001")  # John 1:1
            outcome["example"] = [[round(x, 3) for x in row] for row in weights[shown].tolist()]
    return outcome


EXPERIMENT = Experiment(
    "alignment",
    [{"score": score, "steps": 3000, "seed": seed} for score in ("additive", "general") for seed in range(3)],
    measure,
)
