"""The law, its fit, and the three ways of finding the best size."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize_scalar

from attnbook.analysis.intervals import take
from attnbook.analysis.scaling import (
    STARTS,
    Law,
    envelope,
    fit,
    huber_objective,
    interpolate,
    isoflop,
    log_loss,
    simulate,
)
from attnbook.data.chinchilla import Runs
from helpers import complains, loaded

LAW = Law(1.8, 480.0, 2100.0, 0.35, 0.37)
BUDGETS = np.geomspace(6e18, 3e21, 7)


def theta(law):
    return np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])


def grid(law=LAW, noise=0.0, seed=0):
    """Runs at seven budgets, sizes common to all of them, within a factor of five of the best."""
    sizes, compute = np.meshgrid(np.geomspace(3e7, 2e10, 20), BUDGETS)
    near = np.abs(np.log(sizes / law.allocate(compute)[0])) < np.log(5)
    sizes, compute = sizes[near], compute[near]
    return simulate(law, sizes, compute / 6 / sizes, noise=noise, generator=np.random.default_rng(seed))


laws = st.builds(
    Law,
    E=st.floats(0.1, 3),
    A=st.floats(1, 1e3),
    B=st.floats(1, 1e4),
    alpha=st.floats(0.1, 0.9),
    beta=st.floats(0.1, 0.9),
)


@given(laws, st.floats(1e15, 1e25))
def test_no_other_division_of_a_budget_is_better(law, compute):
    size, tokens = law.allocate(compute)
    assert 6 * size * tokens == pytest.approx(compute, rel=1e-9)
    found = minimize_scalar(
        lambda x: law.loss(np.exp(x), compute / 6 / np.exp(x)) - law.E,
        bracket=(np.log(size) - 1, np.log(size) + 1.5),
        tol=1e-12,
    )
    assert found.fun == pytest.approx(law.frontier(compute) - law.E, rel=1e-9)
    assert found.x == pytest.approx(np.log(size), abs=2e-3)


def test_the_frontier_follows_power_laws():
    a, b = LAW.exponents
    assert a + b == pytest.approx(1)
    assert a == pytest.approx(LAW.beta / (LAW.alpha + LAW.beta))
    compute = np.array([1e18, 1e20])
    size, tokens = LAW.allocate(compute)
    assert np.log(size[1] / size[0]) / np.log(100) == pytest.approx(a)
    assert np.log(tokens[1] / tokens[0]) / np.log(100) == pytest.approx(b)
    gain = (LAW.frontier(compute) - LAW.E)[0] / (LAW.frontier(compute) - LAW.E)[1]
    assert np.log(gain) / np.log(100) == pytest.approx(LAW.alpha * LAW.beta / (LAW.alpha + LAW.beta))
    assert LAW.allocate(1e20, flops=8.0)[0] == pytest.approx(LAW.allocate(0.75e20)[0])


def test_log_loss_is_the_logarithm_of_the_law_and_its_shares_sum_to_one():
    runs = grid()
    value, shares = log_loss(theta(LAW), runs.parameters, runs.tokens)
    np.testing.assert_allclose(value, np.log(LAW.loss(runs.parameters, runs.tokens)), rtol=1e-12)
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-12)
    np.testing.assert_allclose(shares[2], LAW.E / runs.loss, rtol=1e-12)


def test_log_loss_does_not_overflow():
    value, shares = log_loss([800.0, 0.0, 0.0, 0.0, 0.0], np.array([10.0]), np.array([10.0]))
    assert value == pytest.approx(800)
    assert [share.item() for share in shares] == [1, 0, 0]


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
def test_the_gradient_is_that_of_the_objective(delta):
    runs = grid(noise=0.01)
    point = theta(LAW) + np.array([0.1, -0.1, 0.02, 0.003, -0.002])
    _, gradient = huber_objective(point, runs, delta)
    numeric = approx_fprime(point, lambda p: huber_objective(p, runs, delta)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=2e-4, atol=1e-6 * np.abs(numeric).max())


def test_the_objective_is_hubers_and_takes_many_points_at_once():
    runs = take(grid(noise=0.01), np.arange(9))
    residual = np.log(LAW.loss(runs.parameters, runs.tokens) / runs.loss)
    near = np.abs(residual) <= 5e-3
    expected = np.where(near, residual**2 / 2, 5e-3 * (np.abs(residual) - 2.5e-3)).sum()
    assert 0 < near.sum() < 9
    assert huber_objective(theta(LAW), runs, 5e-3)[0] == pytest.approx(expected)
    values, gradients = huber_objective(np.stack([theta(LAW), theta(LAW) + 0.01]), runs, 5e-3)
    assert values.shape == (2,)
    assert gradients.shape == (2, 5)
    assert values[0] == pytest.approx(expected)


def test_fit_recovers_a_planted_law_exactly_without_noise():
    found = fit(grid())
    assert found.law == pytest.approx(LAW, rel=1e-4)
    assert found.objective < 1e-12
    assert found.objectives.min() == found.objective
    assert all(type(number) is float for number in found.law)


def test_fit_recovers_planted_exponents_from_noisy_runs():
    errors = [fit(grid(noise=0.005, seed=seed), starts=LAW).law.exponents[0] - LAW.exponents[0] for seed in range(12)]
    assert abs(np.mean(errors)) < 0.01
    assert 0.002 < np.std(errors) < 0.03


def test_a_law_whose_floor_vanished_can_be_a_start():
    found = fit(grid(), starts=LAW._replace(E=0.0))
    assert np.isfinite(found.law).all()
    assert np.isfinite(found.objective)


def test_huber_shrugs_off_a_wrong_loss():
    runs = grid(noise=0.002)
    spoiled = runs._replace(loss=np.where(np.arange(len(runs.loss)) == len(runs.loss) // 2, 3 * runs.loss, runs.loss))
    moved = []
    for delta in (1e-3, 10.0):
        clean, wrong = (np.array(fit(each, delta=delta, starts=LAW).law) for each in (runs, spoiled))
        moved.append(np.abs(np.log(wrong / clean)).max())
    assert moved[0] < 0.05
    assert moved[1] > 5 * moved[0]


def test_the_published_points_give_the_published_refit():
    runs = loaded("chinchilla")
    kept = take(runs, np.argsort(runs.loss)[:240])
    law = fit(kept).law
    assert pytest.approx(1.8172, abs=2e-4) == law.E
    assert pytest.approx(477.8, abs=0.5) == law.A
    assert pytest.approx(2143, abs=3) == law.B
    assert law.alpha == pytest.approx(0.3473, abs=2e-4)
    assert law.beta == pytest.approx(0.3672, abs=2e-4)


def test_a_scale_that_is_too_small_stops_the_optimiser_early():
    runs = grid(noise=0.003)
    start = Law(1.7, 400.0, 400.0, 0.34, 0.285)
    well, early = (fit(runs, starts=start, scale=scale) for scale in (1e6, 1 / len(runs.loss)))
    assert early.objective > 1.02 * well.objective
    assert abs(early.law.beta - start.beta) < 0.01 < abs(well.law.beta - start.beta)


def test_E_can_be_held():
    held = fit(grid(), E=1.6)
    assert pytest.approx(1.6) == held.law.E
    assert held.objective > 1e-6


def test_only_the_best_starts_are_followed():
    runs = grid()
    found = fit(runs, follow=3)
    assert found.objectives.shape == (3,)
    assert STARTS.shape == (4500, 5)
    assert fit(runs, starts=STARTS[:7], follow=10).objectives.shape == (7,)


def test_interpolate_returns_the_runs_at_their_own_budgets_and_the_law_between_them():
    runs = grid()
    own = interpolate(runs, BUDGETS)
    enough = [size for size in np.unique(runs.parameters) if (runs.parameters == size).sum() > 1]
    kept = take(runs, np.isin(runs.parameters, enough))
    assert len(own.loss) == len(kept.loss)
    order = np.lexsort((kept.compute, kept.parameters))
    np.testing.assert_allclose(own.loss, kept.loss[order], rtol=1e-9)
    np.testing.assert_allclose(own.tokens, kept.tokens[order], rtol=1e-9)
    between = interpolate(runs, np.sqrt(BUDGETS[:-1] * BUDGETS[1:]))
    np.testing.assert_allclose(between.loss, LAW.loss(between.parameters, between.tokens), rtol=3e-3)
    np.testing.assert_allclose(between.tokens, between.compute / 6 / between.parameters, rtol=1e-6)


def test_interpolate_averages_repeated_runs_and_never_extrapolates():
    runs = Runs(*(np.array(column) for column in ([5.0] * 3, [1.0, 1.0, 4.0], [30.0, 30.0, 120.0], [3.0, 3.2, 2.0])))
    assert interpolate(runs, 30.0).loss == pytest.approx([3.1])
    assert len(interpolate(runs, [29.0, 121.0]).loss) == 0
    assert len(interpolate(take(runs, [0]), 30.0).loss) == 0


def test_both_other_ways_recover_planted_exponents_without_noise():
    a, b = LAW.exponents
    parabolas = isoflop(grid(), BUDGETS)
    assert parabolas.a == pytest.approx(a, abs=0.005)
    assert parabolas.b == pytest.approx(b, abs=0.005)
    np.testing.assert_allclose(parabolas.compute, BUDGETS, rtol=1e-9)
    np.testing.assert_allclose(parabolas.parameters, LAW.allocate(BUDGETS)[0], rtol=0.05)
    np.testing.assert_allclose(6 * parabolas.parameters * parabolas.tokens, BUDGETS, rtol=1e-9)
    curves = envelope(grid())
    assert curves.a == pytest.approx(a, abs=0.03)
    assert curves.b == pytest.approx(b, abs=0.03)


def test_windows_that_move_with_the_best_size_give_the_exact_exponent():
    sizes = LAW.allocate(BUDGETS)[0][:, None] * np.geomspace(1 / 8, 5, 9)
    runs = simulate(LAW, sizes, BUDGETS[:, None] / 6 / sizes)
    found = isoflop(runs, BUDGETS)
    assert found.a == pytest.approx(LAW.exponents[0], abs=1e-9)
    ratio = found.parameters / LAW.allocate(BUDGETS)[0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    assert ratio[0] != pytest.approx(1, abs=1e-3)


def test_minima_at_the_edge_are_left_out():
    """Where the budget falls as size grows, no budget has its best size inside the grid."""
    runs = grid()
    small = take(runs, runs.parameters < LAW.allocate(BUDGETS[0])[0])
    with pytest.raises(ValueError, match="minima at two or more budgets"):
        isoflop(small, BUDGETS[3:])


def test_simulate_adds_the_noise_it_is_told_to():
    runs = simulate(LAW, np.full(4000, 1e9), 1e10, noise=0.02, generator=np.random.default_rng(1))
    assert np.log(runs.loss / LAW.loss(1e9, 1e10)).std() == pytest.approx(0.02, rel=0.05)
    np.testing.assert_allclose(runs.compute, 6e19)


def test_importing_the_library_does_not_load_scipy():
    code = "import sys, attnbook; assert not [m for m in sys.modules if m.startswith(('scipy', 'matplotlib'))]"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


BAD = Runs(*(np.array([1.0, 2.0, 3.0, 4.0, 5.0, column]) for column in (6.0, 6.0, 6.0, -1.0)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fit(take(grid(), np.arange(4))), "runs: expected at least 5, got 4"),
        (lambda: fit(BAD), "runs.loss: expected finite numbers > 0, got others"),
        (lambda: fit(grid(), delta=0), "delta: expected a number > 0, got 0"),
        (lambda: fit(grid(), E=-1.0), "E: expected a number > 0, got -1.0"),
        (lambda: fit(grid(), scale=0.0), "scale: expected a number > 0, got 0.0"),
        (lambda: fit(grid(), follow=0), "follow: expected an integer ≥ 1, got 0"),
        (
            lambda: fit(grid(), starts=np.zeros((3, 4))),
            "starts: expected rows of (log A, log B, log E, α, β), got shape (3, 4)",
        ),
        (lambda: envelope(grid(), points=1), "points: expected an integer ≥ 2, got 1"),
        (
            lambda: isoflop(grid(), 1.0),
            "runs: expected minima at two or more budgets, of different sizes, got 0 minima",
        ),
        (
            lambda: simulate(LAW, 1e9, 1e10, noise=0.1),
            "generator: expected a NumPy generator, as there is noise, got None",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
