"""Hopfield retrieval: attention as descent on an energy."""

from __future__ import annotations

import pytest
import torch

import attnbook
from attnbook.mechanisms import hopfield_retrieve
from attnbook.mechanisms.hopfield import hopfield_energy
from helpers import array, assert_close, complains


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_states_of_any_rank_and_their_energy_equal_the_specification(shape, steps):
    state, patterns = draw(*shape), draw(5, 7)
    found = hopfield_retrieve(state, patterns, beta=0.7, steps=steps)
    assert_close(found, attnbook.reference.hopfield_retrieve(array(state), array(patterns), beta=0.7, steps=steps))
    energy = hopfield_energy(state, patterns, beta=0.7)
    assert energy.shape == shape[:-1]
    assert_close(energy, attnbook.reference.hopfield_energy(array(state), array(patterns), beta=0.7))


def test_a_step_is_attention_to_the_patterns():
    state, patterns = draw(2, 4, 9, 7), draw(5, 7)
    stored = patterns.expand(2, 4, 5, 7)
    assert_close(hopfield_retrieve(state, patterns, beta=1.3), attnbook.attention(state, stored, stored, scale=1.3))


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_energy_never_rises_and_is_never_negative(beta, size):
    state, patterns = size * draw(200, 16), draw(40, 16)
    energies = [hopfield_energy(state, patterns, beta=beta)]
    for _ in range(20):
        state = hopfield_retrieve(state, patterns, beta=beta)
        energies.append(hopfield_energy(state, patterns, beta=beta))
    energy = torch.stack(energies)
    assert (energy.diff(dim=0) <= 1e-12 * energy.abs().max()).all()
    assert (energy[1] < energy[0]).any()
    assert (energy >= -1e-12).all()


def test_a_step_against_the_gradient_of_the_energy():
    # ∇E = ξ − Xᵀ softmax(β X ξ): a step of length 1 down the gradient is the update.
    state, patterns = draw(6, 8).requires_grad_(), draw(5, 8)
    (gradient,) = torch.autograd.grad(hopfield_energy(state, patterns, beta=2.0).sum(), state)
    assert_close(state - gradient, hopfield_retrieve(state, patterns, beta=2.0))


def test_one_step_retrieves_patterns_far_apart_and_the_error_falls_exponentially_with_beta():
    patterns = torch.nn.functional.normalize(draw(50, 64), dim=-1)
    noisy = patterns + 0.02 * draw(50, 64)
    errors = [(hopfield_retrieve(noisy, patterns, beta=b) - patterns).norm(dim=-1).max() for b in (20.0, 40.0, 80.0)]
    assert errors[-1] < 1e-6
    rates = [float((a / b).log()) / step for a, b, step in zip(errors, errors[1:], (20, 40), strict=False)]
    assert min(rates) > 0.2  # the log of the error falls by at least this much for each unit of β


def test_a_small_beta_retrieves_the_mean():
    state, patterns = draw(4, 6), draw(9, 6)
    found = hopfield_retrieve(state, patterns, beta=1e-9)
    assert torch.allclose(found, patterns.mean(0).expand(4, 6), atol=1e-7)


def test_gradcheck():
    state, patterns = draw(3, 4).requires_grad_(), draw(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: hopfield_retrieve(s, p, beta=0.8, steps=3), (state, patterns))
    assert torch.autograd.gradcheck(lambda s, p: hopfield_energy(s, p, beta=0.8), (state, patterns))


GOOD, STORED = torch.zeros(2, 3), torch.zeros(4, 3)
BAD = {
    "patterns: expected a tensor (M, D), got float32 tensor of shape (3,)": {"patterns": STORED[0]},
    "patterns: expected last axis D = 3, that of state, got shape (4, 2)": {"patterns": STORED[:, :2]},
    "patterns: expected float32, the type of state, got float64": {"patterns": STORED.double()},
    "patterns: expected no NaN, got 12 NaN of 12 elements": {"patterns": STORED * float("nan")},
    "state: expected no NaN, got 6 NaN of 6 elements": {"state": GOOD * float("nan")},
    "beta: expected a finite number > 0, got 0": {"beta": 0},
    "beta: expected a finite number > 0, got inf": {"beta": float("inf")},
    "steps: expected an integer ≥ 1, got 0": {"steps": 0},
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        hopfield_retrieve(**{"state": GOOD, "patterns": STORED, "beta": 1.0, **arguments})
