"""The scaffolding network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnbook.models import ScaffoldingConfig, ScaffoldingNetwork
from helpers import complains, tokens

SMALL = ScaffoldingConfig(vocab_size=13, slots=3, width=16)
STORY, QUESTIONS = tokens(4, 5, 4, low=1, high=13), tokens(4, 2, 3, low=1, high=13, seed=1)
TIMES, ANSWERS = torch.tensor([[2, 5], [1, 4], [3, 3], [5, 2]]), tokens(4, 2, low=1, high=13, seed=2)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, slots=1, width=6)])
def test_the_formula_counts_the_parameters(config):
    assert sum(p.numel() for p in ScaffoldingNetwork(config).parameters()) == config.num_parameters()


def test_shapes_and_gradients():
    model = ScaffoldingNetwork(SMALL)
    lesson = model(STORY, QUESTIONS, TIMES)
    assert lesson.logits.shape == (4, 2, 13)
    assert lesson.writes.shape == lesson.log_probabilities.shape == (4, 5)
    assert lesson.weights.shape == (4, 2, 3)
    torch.testing.assert_close(lesson.weights.sum(-1), torch.ones(4, 2))
    assert ((lesson.writes >= 0) & (lesson.writes <= 3)).all()
    answers = ANSWERS.clone()
    answers[0] = lesson.logits[0].argmax(-1)  # some reward, and not the same for all
    total = sum(model.loss(STORY, QUESTIONS, TIMES, answers) for _ in range(8))
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_question_knows_what_was_read_before_it():
    model = ScaffoldingNetwork(SMALL).double()
    model.skip.bias.data.fill_(-100.0)  # every sentence is written somewhere
    read = []
    model.reader.register_forward_hook(lambda module, args, output: read.append(output[1]))
    logits = model(STORY, QUESTIONS, TIMES).logits
    for q in range(2):
        (gradient,) = torch.autograd.grad(logits[:, q].square().sum(), read[0], retain_graph=True)
        seen = gradient[0].unflatten(0, (4, 5)).abs().sum(-1) > 0
        assert torch.equal(seen, torch.arange(5) < TIMES[:, q : q + 1])


def test_one_slot_is_rewritten_and_the_others_stay():
    model = ScaffoldingNetwork(SMALL)
    memories = []
    model.write.register_forward_hook(lambda module, args, output: memories.append((args[1], output)))
    writes = model(STORY, QUESTIONS, TIMES, sample=True).writes
    for i in range(4):
        before, new = (x.view(4, 3, 16) for x in memories[i])
        after = memories[i + 1][0].view(4, 3, 16)
        for b in range(4):
            for k in range(3):
                assert torch.equal(after[b, k], (new if writes[b, i] == k else before)[b, k])


def test_padding_changes_nothing():
    model = ScaffoldingNetwork(SMALL)
    with torch.no_grad():
        short = model(STORY[:, :3], QUESTIONS, TIMES.clamp(max=3))
        story = torch.nn.functional.pad(STORY[:, :3], (0, 2, 0, 2))
        padded = model(story, torch.nn.functional.pad(QUESTIONS, (0, 1)), torch.where(TIMES > 3, 5, TIMES))
    torch.testing.assert_close(padded.logits, short.logits)
    assert (padded.writes[:, 3:] == 3).all()
    assert (padded.log_probabilities[:, 3:] == 0).all()


def test_choices_are_drawn_from_the_policy():
    model = ScaffoldingNetwork(SMALL)
    story, questions = STORY[:1, :1].expand(4000, -1, -1), QUESTIONS[:1, :1].expand(4000, -1, -1)
    with torch.no_grad():
        lesson = model(story, questions, torch.ones(4000, 1, dtype=torch.int64), sample=True)
    for slot in range(4):
        drawn = lesson.writes[:, 0] == slot
        assert drawn.any()
        probability = lesson.log_probabilities[drawn, 0][0].exp()
        assert drawn.float().mean().item() == pytest.approx(probability.item(), abs=0.03)


def test_reward_alone_teaches_where_to_write():
    # A sentence, and a reward for writing it anywhere but the last slot: the policy's gradient must find that out.
    model = ScaffoldingNetwork(SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    story, questions = STORY[:1, :1].expand(64, -1, -1), QUESTIONS[:1, :1].expand(64, -1, -1)
    times = torch.ones(64, 1, dtype=torch.int64)
    for _ in range(40):
        lesson = model(story, questions, times, sample=True)
        reward = (lesson.writes[:, 0] < 2).float()
        optimizer.zero_grad()
        (-((reward - reward.mean()) * lesson.log_probabilities[:, 0]).mean()).backward()
        optimizer.step()
    assert reward.mean() > 0.9


def test_one_batch_can_be_learned_by_heart():
    model = ScaffoldingNetwork(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(STORY, QUESTIONS, TIMES, ANSWERS).backward()
        optimizer.step()
    assert torch.equal(model(STORY, QUESTIONS, TIMES).logits.argmax(-1), ANSWERS)


MODEL = ScaffoldingNetwork(SMALL)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replace(SMALL, slots=0), "slots: expected an integer ≥ 1, got 0"),
        (lambda: MODEL(STORY[0], QUESTIONS, TIMES), "story: expected a tensor (B, S, J), got int64…"),
        (lambda: MODEL(STORY, QUESTIONS[:2], TIMES), "questions: expected batch size 4, that of story, got int64…"),
        (lambda: MODEL(STORY, QUESTIONS, TIMES[:, :1]), "times: expected shape (4, 2), got shape (4, 1)"),
        (lambda: MODEL(STORY, QUESTIONS, TIMES + 1), "times: expected integers in [0, 5], got 2 to 6"),
        (
            lambda: MODEL.loss(STORY, QUESTIONS, TIMES, ANSWERS[:, :1]),
            "answers: expected shape (4, 2), got shape (4, 1)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
