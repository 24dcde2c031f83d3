"""The scaffolding network: a student that reads sentence by sentence into slots of memory, and is asked on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from attnbook.models.count import linear
from attnbook.normalizers import softmax
from attnbook.scores import scaled_dot
from attnbook.shapes import check_count, check_tensor, mismatch, tensor_shape


@dataclass(frozen=True)
class ScaffoldingConfig:
    """The shape of a :class:`ScaffoldingNetwork`.

    Attributes:
        vocab_size: V; token 0 is padding.
        slots: K, places of the memory.
        width: E.
    """

    vocab_size: int
    slots: int
    width: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "slots", "width"):
            check_count(name, getattr(self, name))

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        V, E = self.vocab_size, self.width
        recurrent = 3 * 2 * linear(E, E)  # three gates, each of input and state
        return V * E + self.slots * E + 2 * recurrent + 2 * linear(E, E) + linear(E, 1) + linear(2 * E, V)


class Lesson(NamedTuple):
    """What a student did with a story.

    Attributes:
        logits: (B, Q, V), unnormalised log-probabilities of the answers.
        writes: (B, S) integers: the slot that each sentence went to; K where it was passed over.
        log_probabilities: (B, S), of these choices; 0 for sentences of padding.
        weights: (B, Q, K), where each question looked.
    """

    logits: Tensor
    writes: Tensor
    log_probabilities: Tensor
    weights: Tensor


class ScaffoldingNetwork(nn.Module):
    """Read a story into a few slots of memory, choosing where each sentence goes, and answer questions on the way.

    In {cite}`celikyilmaz2017` a student registers what it reads in a memory, by attention, while a teacher asks about
    what has been read so far; each correct answer rewards the choices that were made before it. Here every sentence is
    turned into a vector, which attends to the slots; the weights, with one more for passing it over, are a policy, from
    which one slot is drawn and rewritten by a gated cell. A question attends to all slots softly. :meth:`loss` has the
    policy's gradient ({cite}`williams1992`) and the answers' cross-entropy.

    Differs from the paper: we know it by its abstracts, and the parts inside are our own choice: the cells, the scores,
    passing over, and learning the answers by cross-entropy beside the reward. The teacher, which there learns to ask,
    is here whoever supplies the questions and the times at which they are asked.

    Args:
        config: its shape.
    """

    def __init__(self, config: ScaffoldingConfig):
        super().__init__()
        self.config = config
        V, E = config.vocab_size, config.width
        self.embedding = nn.Embedding(V, E)
        self.reader = nn.GRU(E, E, batch_first=True)
        self.first = nn.Parameter(torch.empty(config.slots, E))
        self.where, self.find = nn.Linear(E, E), nn.Linear(E, E)
        self.skip = nn.Linear(E, 1)
        self.write = nn.GRUCell(E, E)
        self.output = nn.Linear(2 * E, V)
        nn.init.normal_(self.first, std=1.0)

    def _read(self, words: Tensor) -> Tensor:
        """Turn sentences (B, N, J) into vectors (B, N, E)."""
        flat = words.flatten(0, 1)
        lengths = (flat != 0).sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embedding(flat), lengths, batch_first=True, enforce_sorted=False)
        return self.reader(packed)[1][0].unflatten(0, words.shape[:2])

    def forward(
        self,
        story: Tensor,
        questions: Tensor,
        times: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Lesson:
        """Read a story, and answer each question when it is asked.

        Args:
            story: (B, S, J) integers below V; 0 fills up sentences and stories behind.
            questions: (B, Q, J) integers below V, likewise.
            times: (B, Q) integers in [0, S]: how many sentences have been read when the question is asked.
            sample: draw the slots rather than take the most probable ones.
            generator: source of randomness.
        Returns:
            The answers, and what was done.
        Raises:
            ValueError: shapes that do not match, times outside the story.
        """
        batch, sentences, _ = check_tensor("story", story, "B S J", dtypes=(torch.int64,)).shape
        check_tensor("questions", questions, "B Q J", dtypes=(torch.int64,))
        if len(questions) != batch:
            raise mismatch("questions", f"batch size {batch}, that of story", questions)
        if check_tensor("times", times, "B Q", dtypes=(torch.int64,)).shape != questions.shape[:2]:
            raise mismatch("times", f"shape {tuple(questions.shape[:2])}", tensor_shape(times))
        if times.min() < 0 or times.max() > sentences:
            raise mismatch("times", f"integers in [0, {sentences}]", f"{times.min()} to {times.max()}")
        memory = self.first.expand(batch, -1, -1)  # (B, K, E)
        real, slots = (story != 0).any(-1), torch.arange(self.config.slots, device=story.device)
        history, writes, scores = [memory], [], []
        for sentence, is_real in zip(self._read(story).unbind(1), real.unbind(1), strict=True):
            look = scaled_dot(self.where(sentence)[:, None], memory)[:, 0]  # (B, K)
            policy = torch.cat([look, self.skip(sentence)], -1).log_softmax(-1)  # (B, K + 1)
            chosen = policy.argmax(-1)
            if sample:
                chosen = torch.multinomial(policy.exp(), 1, generator=generator)[:, 0]
            chosen = torch.where(is_real, chosen, self.config.slots)
            new = self.write(sentence.repeat_interleave(len(slots), 0), memory.flatten(0, 1)).view_as(memory)
            memory = torch.where((chosen[:, None] == slots)[..., None], new, memory)
            history.append(memory)
            writes.append(chosen)
            scores.append(policy.gather(-1, chosen[:, None])[:, 0] * is_real)
        known = torch.stack(history, 1)  # (B, S + 1, K, E): what was known after each sentence
        known = known[torch.arange(batch, device=story.device)[:, None], times]  # (B, Q, K, E)
        asked = self._read(questions)
        weights = softmax(scaled_dot(self.find(asked)[:, :, None], known))  # (B, Q, 1, K)
        logits = self.output(torch.cat([asked, (weights @ known)[:, :, 0]], -1))
        return Lesson(logits, torch.stack(writes, 1), torch.stack(scores, 1), weights[:, :, 0])

    def loss(
        self,
        story: Tensor,
        questions: Tensor,
        times: Tensor,
        answers: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return what training makes small: the answers' cross-entropy, and the policy's loss under the rewards.

        A correct answer is worth 1 to all choices made before the question; a choice's worth is counted from the mean
        over the batch of what such choices bring.

        Args:
            story: as for :meth:`forward`.
            questions: likewise.
            times: likewise.
            answers: (B, Q) integers below V.
            generator: source of randomness.
        Returns:
            Scalar.
        Raises:
            ValueError: as for :meth:`forward`.
        """
        lesson = self(story, questions, times, sample=True, generator=generator)
        if check_tensor("answers", answers, "B Q", dtypes=(torch.int64,)).shape != times.shape:
            raise mismatch("answers", f"shape {tuple(times.shape)}", tensor_shape(answers))
        rewards = (lesson.logits.argmax(-1) == answers).to(lesson.logits)  # (B, Q)
        before = torch.arange(story.shape[1], device=story.device)[:, None] < times[:, None]  # (B, S, Q)
        worth = (before * rewards[:, None]).sum(-1)  # (B, S)
        policy = -((worth - worth.mean(0)) * lesson.log_probabilities).sum(1).mean()
        return nn.functional.cross_entropy(lesson.logits.flatten(0, 1), answers.flatten()) + policy
