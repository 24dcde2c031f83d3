"""The training loop."""

from __future__ import annotations

import copy
import math
from collections import namedtuple

import pytest
import torch
from torch import nn

from attnbook.train import NonFiniteLoss, fit, schedule
from attnbook.train.groups import parameter_groups
from attnbook.train.loop import _to
from helpers import complains


def problem(seed: int = 0):
    """Return a small regression: model, batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    torch.manual_seed(seed)
    return nn.Linear(3, 1), [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def sgd(model, rate=0.1):
    return torch.optim.SGD(model.parameters(), lr=rate)


def test_the_loss_falls():
    model, batches = problem()
    history = fit(model, squared, batches, steps=300, learning_rate=0.05)
    assert len(history.losses) == 300
    assert history.losses[-1] < 1e-3 < 0.5 < history.losses[0]
    assert model.training
    assert history.seconds > 0
    assert history.evaluations == []


def test_a_run_is_what_plain_pytorch_computes():
    model, batches = problem()
    other = copy.deepcopy(model)
    history = fit(model, squared, batches, steps=6, learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), clip=0.5)
    optimizer = torch.optim.AdamW(
        [{"params": [other.weight], "weight_decay": 0.1}, {"params": [other.bias], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.8, 0.95),
    )
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = squared(other, batches[step % 4])
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
    assert history.losses == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_batches_that_can_be_gone_through_again_are():
    model, batches = problem()
    seen = []

    def watching(model, batch):
        seen.append(batch[0])
        return squared(model, batch)

    fit(model, watching, batches, steps=10)
    for i, x in enumerate(seen):
        assert torch.equal(x, batches[i % 4][0])


def test_an_iterator_that_ends_too_early_is_named():
    model, batches = problem()
    text = "batches: expected enough batches for all steps, or an iterable that can be gone through again, got the end"
    with complains(text):
        fit(model, squared, iter(batches), steps=5)
    with complains(text):
        fit(model, squared, [], steps=1)
    fit(model, squared, iter(batches), steps=4)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_the_rate_follows_the_schedule(name):
    model, batches = problem()
    optimizer, rates = sgd(model, 0.5), []
    factor = schedule(name, steps=12, warmup=3, final=0.1)

    def watching(model, batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return squared(model, batch)

    fit(model, watching, batches, steps=12, optimizer=optimizer, schedule=name, warmup=3, final=0.1)
    assert rates == pytest.approx([0.5 * factor(step) for step in range(12)])


def test_a_schedule_may_be_a_function_and_groups_keep_their_peaks():
    model, batches = problem()
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    rates = []

    def watching(model, batch):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return squared(model, batch)

    fit(model, watching, batches, steps=3, optimizer=optimizer, schedule=lambda step: 1 / (step + 1))
    assert rates == [pytest.approx([0.1 / n, 0.2 / n]) for n in (1, 2, 3)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(bad):
    model, batches = problem()
    states = []

    def failing(model, batch):
        states.append(copy.deepcopy(model.state_dict()))
        return squared(model, batch) * (bad if len(states) == 4 else 1)

    with pytest.raises(NonFiniteLoss, match=rf"^step 3: the loss is {bad}$"):
        fit(model, failing, batches, steps=10)
    assert not torch.equal(states[0]["weight"], states[3]["weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[3][name])


@pytest.mark.parametrize("clip", [1e-3, 0.5, None])
def test_the_gradient_is_clipped(clip):
    model, batches = problem()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fit(model, squared, batches, steps=1, optimizer=sgd(model, 1.0), clip=clip)
    moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()
    if clip is None:
        assert moved > 0.5
    else:
        assert moved.item() == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize(("every", "expected"), [(None, [10]), (1, list(range(1, 11))), (4, [4, 8, 10]), (50, [10])])
def test_evaluations_come_when_due_without_gradients_and_in_evaluation_mode(every, expected):
    model, batches = problem()

    def evaluate(model):
        return model.training, torch.is_grad_enabled(), squared(model, batches[0]).item()

    history = fit(model, squared, batches, steps=10, evaluate=evaluate, evaluate_every=every)
    assert [step for step, _ in history.evaluations] == expected
    assert {value[:2] for _, value in history.evaluations} == {(False, False)}
    assert model.training
    assert history.evaluations[-1][1][2] < history.losses[0]


def test_evaluations_are_left_out_of_the_time(monkeypatch):
    from attnbook.train import loop

    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    model, batches = problem()

    def timed(model, batch):
        now[0] += 1
        return squared(model, batch)

    def evaluate(model):
        now[0] += 100

    assert fit(model, timed, batches, steps=5, evaluate=evaluate, evaluate_every=2).seconds == 5


def test_progress_is_told_of_each_step():
    model, batches = problem()
    told = []
    history = fit(model, squared, batches, steps=3, progress=lambda step, loss: told.append((step, loss)))
    assert told == list(enumerate(history.losses, 1))


class Watching(nn.Module):
    """A linear map that notes the type of its output."""

    def __init__(self):
        super().__init__()
        self.linear, self.types = nn.Linear(3, 1), []

    def forward(self, x):
        y = self.linear(x)
        self.types.append(y.dtype)
        return y


def test_bfloat16_computes_in_half_precision_and_keeps_full_weights():
    _, batches = problem()
    model = Watching()
    history = fit(model, squared, batches, steps=60, learning_rate=0.05, precision="bf16")
    assert set(model.types) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.losses[-1] < history.losses[0] / 4
    model.types.clear()
    fit(model, squared, batches, steps=1)  # a later run chooses its own precision
    assert model.types == [torch.float32]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_forward_is_given_back_as_it_was(precision, fails):
    model, batches = problem()
    loss = (lambda m, b: squared(m, b) * math.nan) if fails else squared
    try:
        fit(model, loss, batches, steps=2, precision=precision)
    except NonFiniteLoss:
        assert fails
    assert model.forward.__func__ is nn.Linear.forward
    assert model(torch.zeros(1, 3)).dtype == torch.float32


def test_frozen_parameters_stay():
    model, batches = problem()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    fit(model, squared, batches, steps=3, weight_decay=1.0)
    assert torch.equal(model.bias, before)


def test_matrices_decay_and_the_rest_does_not():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    assert {p.shape for p in decayed["params"]} == {(5, 4), (4, 4)}
    assert len(plain["params"]) == 3


Batch = namedtuple("Batch", ["x", "rest"])


def test_every_kind_of_batch_is_moved():
    x = torch.ones(2)
    meta = torch.device("meta")
    moved = _to({"a": [x, (x, "text")], "b": Batch(x, None)}, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].x.device == meta
    assert moved["a"][1][1] == "text"
    assert isinstance(moved["b"], Batch)
    assert isinstance(moved["a"][1], tuple)


BAD = {
    "steps: expected an integer ≥ 1, got 0": {"steps": 0},
    "learning_rate: expected a number > 0, got 0": {"learning_rate": 0},
    "learning_rate: expected a number > 0, got nan": {"learning_rate": math.nan},
    "clip: expected a number > 0 or None, got 0": {"clip": 0},
    "precision: expected one of 'no', 'bf16', 'fp16', got 'int8'": {"precision": "int8"},
    "evaluate_every: expected an integer ≥ 1, got 0": {"evaluate_every": 0},
    "name: expected one of 'constant', 'cosine', 'linear', 'inverse_sqrt', 'wsd', got 'step'": {"schedule": "step"},
    "warmup: expected fewer than the 5 steps, got 5": {"warmup": 5},
    "final: expected a number in [0, 1], got 2": {"final": 2},
}


@pytest.mark.parametrize(("text", "options"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named_before_anything_is_trained(text, options):
    model, batches = problem()
    before = copy.deepcopy(model.state_dict())
    with complains(text):
        fit(model, squared, batches, **{"steps": 5, **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
