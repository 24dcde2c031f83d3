"""The end-to-end memory network: questions about a story, answered by looking into it several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.normalizers import softmax
from attnbook.scores import dot
from attnbook.shapes import check_choice, check_count, check_tensor, mismatch

TYINGS = ("adjacent", "layerwise")


@dataclass(frozen=True)
class MemoryNetworkConfig:
    """The shape of a :class:`MemoryNetwork`.

    Attributes:
        vocab_size: V; token 0 is padding.
        memory_size: the most sentences of a story.
        width: E.
        hops: how many times it looks into the story.
        tying: which of the hops' embeddings are the same: "adjacent" or "layerwise".
        position_encoding: weigh a sentence's words by their places rather than add them up alike.
    """

    vocab_size: int
    memory_size: int
    width: int
    hops: int = 3
    tying: str = "adjacent"
    position_encoding: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "memory_size", "width", "hops"):
            check_count(name, getattr(self, name))
        check_choice("tying", self.tying, TYINGS)

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E = self.width
        if self.tying == "adjacent":
            return (self.hops + 1) * (self.vocab_size + self.memory_size) * E
        return (4 * self.vocab_size + 2 * self.memory_size) * E + E * E


def position_weights(words: Tensor, width: int) -> Tensor:
    """Weigh the words of sentences by their places, differently along each axis of the vectors.

    lₖⱼ = (1 − j/J) − (k/E) (1 − 2j/J), with j and k counted from 1, J the sentence's number of words
    ({cite}`sukhbaatar2015`, §4.1).

    Args:
        words: (…, J) integers, 0 where there is none; padding stands behind.
        width: E.
    Returns:
        (…, J, E), float.
    """
    places = words.shape[-1]
    counts = (words != 0).sum(-1).clamp(min=1)[..., None, None]
    j = torch.arange(1, places + 1, device=words.device)[:, None] / counts  # (…, J, 1)
    k = torch.arange(1, width + 1, device=words.device) / width
    return (1 - j) - k * (1 - 2 * j)


class MemoryNetwork(nn.Module):
    """Answer a question about a story ({cite}`sukhbaatar2015`).

    Each sentence is embedded twice, as a key and as a value. The question attends to the keys, and the mix of values is
    added to it; that is a hop. Weights are tied as in the paper's §2.2: "adjacent", where one hop's values are the next
    one's keys, the first keys embed the question too, and the last values' table is the output projection; or
    "layerwise", where all hops share keys and values, and a matrix transforms the question between them. Differs from
    the paper: without the noise that it puts into the memory in training.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: MemoryNetworkConfig):
        super().__init__()
        self.config = config
        V, E = config.vocab_size, config.width
        tables = config.hops + 1 if config.tying == "adjacent" else 2
        self.embeddings = nn.ModuleList(nn.Embedding(V, E, padding_idx=0) for _ in range(tables))
        self.times = nn.ParameterList(nn.Parameter(torch.empty(config.memory_size, E)) for _ in range(tables))
        layerwise = config.tying == "layerwise"
        self.question = nn.Embedding(V, E, padding_idx=0) if layerwise else self.embeddings[0]
        self.between = nn.Linear(E, E, bias=False) if layerwise else None
        self.output = nn.Linear(E, V, bias=False)
        if not layerwise:
            self.output.weight = self.embeddings[-1].weight
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)
        for table in (*self.embeddings, self.question):
            nn.init.zeros_(table.weight.data[0])

    def _embed(self, words: Tensor, table: nn.Embedding) -> Tensor:
        """Turn sentences (…, J) into vectors (…, E)."""
        vectors = table(words)  # (…, J, E)
        if self.config.position_encoding:
            vectors = vectors * position_weights(words, self.config.width).to(vectors)
        return vectors.sum(-2)

    def forward(self, story: Tensor, question: Tensor, *, linear: bool = False, return_weights: bool = False) -> Any:
        """Score each word as the answer.

        Args:
            story: (B, S, J) integers below V: S sentences, the last one the latest; 0 fills up sentences behind, and
                stories in front.
            question: (B, J) integers below V; 0 fills up behind.
            linear: attend without the softmax, as the paper begins its training (linear start).
            return_weights: return the weights of each hop too.
        Returns:
            (B, V), unnormalised log-probabilities; with return_weights also (B, hops, S).
        Raises:
            ValueError: another rank, batch sizes that differ, more sentences than the memory holds.
        """
        config = self.config
        check_tensor("story", story, "B S J", dtypes=(torch.int64, torch.int32))
        check_tensor("question", question, "B J", dtypes=(torch.int64, torch.int32))
        sentences = story.shape[1]
        if sentences > config.memory_size:
            raise mismatch("story", f"at most {config.memory_size} sentences on axis 1", story)
        if len(question) != len(story):
            raise mismatch("question", f"batch size {len(story)}, that of story", question)
        mask = (story != 0).any(-1)[:, None]  # (B, 1, S)
        # Time is counted back from the question: row 0 belongs to the last sentence.
        memories = [
            self._embed(story, table) + time[:sentences].flip(0)
            for table, time in zip(self.embeddings, self.times, strict=True)
        ]  # each (B, S, E)
        state, every = self._embed(question, self.question)[:, None], []  # (B, 1, E)
        for hop in range(config.hops):
            first = hop if self.between is None else 0
            keys, values = memories[first], memories[first + 1]
            scores = dot(state, keys)  # (B, 1, S)
            weights = scores * mask if linear else softmax(scores, mask=mask)
            state = (state if self.between is None else self.between(state)) + weights @ values
            every.append(weights)
        logits = self.output(state[:, 0])
        return (logits, torch.cat(every, 1)) if return_weights else logits
