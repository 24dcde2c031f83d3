"""Scaling laws: how loss falls with parameters and tokens, and how a budget is best divided between the two.

The law is L(N, D) = E + A/N^α + B/D^β. Three ways of reading the best division off runs are here, those of
{cite}`hoffmann2022`: the envelope of the curves of all sizes, parabolas through runs of equal compute, and a fit of the
law itself. Any of them can be given to :func:`attnbook.analysis.intervals.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbook.data.chinchilla import Runs
from attnbook.shapes import check_count, mismatch

Array = NDArray[np.float64]


class Law(NamedTuple):
    """The law L(N, D) = E + A/N^α + B/D^β.

    Attributes:
        E: the loss that neither size nor data removes.
        A: weight of the term of size.
        B: weight of the term of data.
        alpha: exponent of the parameters.
        beta: exponent of the tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """Return the loss of a model with so many parameters, trained on so many tokens."""
        return self.E + self.A * np.power(parameters, -self.alpha) + self.B * np.power(tokens, -self.beta)

    @property
    def exponents(self) -> tuple[float, float]:
        """The exponents (a, b) of the best N and the best D in compute; they sum to one."""
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:
        """The factor G that divides a budget, as N = G·(C/κ)^a and D = (C/κ)^b/G."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def allocate(self, compute: ArrayLike, *, flops: float = 6.0) -> tuple[Array, Array]:
        """Divide a budget as well as the law allows.

        Args:
            compute: C, in floating-point operations.
            flops: κ, operations for each parameter and token: C = κND.
        Returns:
            The parameters and the tokens that minimise the loss.
        """
        a, b = self.exponents
        product_ = np.asarray(compute, dtype=float) / flops
        return self.G * product_**a, product_**b / self.G

    def frontier(self, compute: ArrayLike, *, flops: float = 6.0) -> Array:
        """Return the least loss that a budget can buy."""
        return self.loss(*self.allocate(compute, flops=flops))


class Fit(NamedTuple):
    """A fitted law.

    Attributes:
        law: the best one.
        objective: the sum of its Huber losses.
        objectives: the same for every start that was followed, in the order of the starts.
    """

    law: Law
    objective: float
    objectives: Array


class Optima(NamedTuple):
    """The best sizes at several budgets, and the power laws through them.

    Attributes:
        a: exponent of the best N in compute.
        b: exponent of the best D in compute.
        compute: the budgets at which a minimum was found.
        parameters: the best N at each.
        tokens: the D that goes with it.
    """

    a: float
    b: float
    compute: Array
    parameters: Array
    tokens: Array


# Starts of the fit, in the order (log A, log B, log E, α, β): the grid of Hoffmann et al. as Besiroglu et al. give it.
STARTS = np.array(
    list(product(range(0, 30, 5), range(0, 30, 5), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2))),
    dtype=float,
)


def log_loss(theta: ArrayLike, parameters: ArrayLike, tokens: ArrayLike) -> tuple[Array, tuple[Array, ...]]:
    """Return the logarithm of the law, by log-sum-exp, and the share of each of its three terms.

    Args:
        theta: (…, 5): log A, log B, log E, α, β.
        parameters: N, (n,).
        tokens: D, (n,).
    Returns:
        log L (…, n), and the shares (…, n) of the terms of size, of data and of E, which sum to one.
    """
    theta = np.asarray(theta, dtype=float)
    a, b, e, alpha, beta = (theta[..., i : i + 1] for i in range(5))
    terms = (a - alpha * np.log(parameters), b - beta * np.log(tokens), e)
    total = np.logaddexp(np.logaddexp(terms[0], terms[1]), e)
    return total, tuple(np.exp(term - total) for term in terms)


def huber_objective(theta: ArrayLike, runs: Runs, delta: float) -> tuple[Array, Array]:
    """Sum the Huber losses of the log residuals; return the sum and its gradient.

    Args:
        theta: (…, 5): log A, log B, log E, α, β.
        runs: to be described.
        delta: where the loss turns from quadratic to linear.
    Returns:
        The sum (…,) and its gradient (…, 5).
    """
    predicted, shares = log_loss(theta, runs.parameters, runs.tokens)
    residual = predicted - np.log(runs.loss)
    pull = np.minimum(np.maximum(residual, -delta), delta)  # the derivative of Huber's loss
    size, data, rest = (share * pull for share in shares)
    gradient = (size, data, rest, -np.log(runs.parameters) * size, -np.log(runs.tokens) * data)
    return (pull * (residual - pull / 2)).sum(-1), np.stack([part.sum(-1) for part in gradient], -1)


def fit(
    runs: Runs,
    *,
    delta: float = 1e-3,
    starts: ArrayLike | Law | None = None,
    follow: int = 24,
    E: float | None = None,
    scale: float = 1e6,
    options: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit the law as {cite:t}`hoffmann2022` do: Huber's loss of log residuals, by L-BFGS from several starts.

    Args:
        runs: at least five.
        delta: where Huber's loss turns from quadratic to linear, in units of log loss.
        starts: a law to start from, or rows of (log A, log B, log E, α, β); ``STARTS`` by default.
        follow: of the starts, how many with the lowest objective are followed to a minimum.
        E: hold E at this value instead of fitting it.
        scale: by which the sum is multiplied before the optimiser sees it; the default makes it of order one to a
            thousand. The minimum is the same for any scale; where the optimiser stops is not.
        options: of SciPy's L-BFGS-B, whose tolerances are absolute for objectives below one.
    Returns:
        The best law found, its objective (always the sum), and those of all followed starts.
    Raises:
        ValueError: fewer than five runs, values that are not positive, an impossible delta or E.
    Cost: about 10 ms a start for 240 runs.  Differs from the paper: the gradient is exact, and of the 4,500 starts
        only the most promising are followed.  Chapter: {ref}`sec-37-scaling`.
    """
    from scipy.optimize import minimize

    _check(runs, least=5)
    check_count("follow", follow)
    for name, number in (("delta", delta), ("E", E), ("scale", scale)):
        if number is not None and not number > 0:
            raise mismatch(name, "a number > 0", number)
    if isinstance(starts, Law):
        sizes = np.maximum([starts.A, starts.B, starts.E], np.finfo(float).tiny)  # an E that vanished is 0
        starts = [[*np.log(sizes), starts.alpha, starts.beta]]
    theta = np.array(STARTS if starts is None else starts, dtype=float)
    if theta.ndim != 2 or theta.shape[1] != 5:
        raise mismatch("starts", "rows of (log A, log B, log E, α, β)", f"shape {theta.shape}")
    if E is not None:
        theta[:, 2] = np.log(E)
    if len(theta) > follow:
        order = np.argsort(huber_objective(theta, runs, delta)[0], kind="stable")
        theta = theta[order[:follow]]
    bounds = None if E is None else [(None, None)] * 2 + [(np.log(E),) * 2] + [(None, None)] * 2
    found = [
        minimize(
            lambda p: tuple(scale * part for part in huber_objective(p, runs, delta)),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 5000, "maxfun": 20000, **(options or {})},
        )
        for start in theta
    ]
    objectives = np.array([result.fun / scale for result in found])
    best = found[int(np.argmin(objectives))].x
    law = Law(*(float(x) for x in (*np.exp(best[[2, 0, 1]]), best[3], best[4])))
    return Fit(law, float(objectives.min()), objectives)


def interpolate(runs: Runs, compute: ArrayLike) -> Runs:
    """Read off what each size reaches at given budgets, between its own runs.

    Loss and tokens are interpolated in logarithms, by monotone cubics; nothing is extrapolated.

    Args:
        runs: several for each size.
        compute: the budgets.
    Returns:
        A run for each size and each budget that lies between its least and its greatest.
    """
    from scipy.interpolate import PchipInterpolator

    budgets = np.unique(np.asarray(compute, dtype=float))
    rows = []
    for size in np.unique(runs.parameters):
        own = runs.parameters == size
        spent = np.unique(runs.compute[own])
        if len(spent) < 2:
            continue
        same = [own & (runs.compute == c) for c in spent]  # runs that differ by their seed only are averaged
        values = np.log([[runs.tokens[at].mean(), runs.loss[at].mean()] for at in same])
        inside = budgets[(budgets >= spent[0] * (1 - 1e-9)) & (budgets <= spent[-1] * (1 + 1e-9))]
        read = np.exp(PchipInterpolator(np.log(spent), values)(np.log(inside)))
        rows += [(size, tokens, c, loss) for c, (tokens, loss) in zip(inside, read, strict=True)]
    return Runs(*np.array(rows).reshape(-1, 4).T)


def envelope(runs: Runs, *, points: int = 100) -> Optima:
    """Find the best size at many budgets from the curves of all sizes: approach 1 of {cite:t}`hoffmann2022`.

    A curve here joins runs of one size, each trained to the end of its own schedule. Budgets at which the best size is
    the smallest or the largest that reaches them say nothing about a minimum, and are left out.

    Args:
        runs: several for each size.
        points: budgets, equally spaced in the logarithm.
    Returns:
        The best sizes and the exponents of the power laws through them.
    Raises:
        ValueError: fewer than two different sizes are ever the best.
    """
    check_count("points", points, least=2)
    _check(runs, least=4)
    known = interpolate(runs, np.geomspace(runs.compute.min(), runs.compute.max(), points))
    best = []
    for budget in np.unique(known.compute):
        at = np.flatnonzero(known.compute == budget)
        winner = at[known.loss[at].argmin()]
        if len(at) > 2 and known.parameters[at].min() < known.parameters[winner] < known.parameters[at].max():
            best.append((budget, known.parameters[winner], known.tokens[winner]))
    return _power_laws(best)


def isoflop(runs: Runs, compute: ArrayLike, *, within: float = 0.15) -> Optima:
    """Find the best size at each budget by a parabola in log N: approach 2 of {cite:t}`hoffmann2022`.

    Args:
        runs: near the budgets; make them with :func:`interpolate` where the grid is another.
        compute: the budgets.
        within: how far, in log C, a run may lie from its budget.
    Returns:
        The parabolas' minima and the exponents of the power laws through them. A budget is left out where its runs
        have fewer than three sizes, or where the parabola has no minimum between its smallest and largest size.
    Raises:
        ValueError: fewer than two budgets remain.
    """
    best = []
    for budget in np.atleast_1d(np.asarray(compute, dtype=float)):
        at = np.abs(np.log(runs.compute / budget)) <= within
        size = np.log(runs.parameters[at])
        if len(np.unique(size)) < 3:
            continue
        curvature, slope, _ = np.polyfit(size - size.mean(), runs.loss[at], 2)
        vertex = size.mean() - slope / (2 * curvature)
        if curvature > 0 and size.min() < vertex < size.max():
            spent = np.exp(np.log(runs.compute[at]).mean())
            flops = np.exp(np.log(runs.compute[at] / (runs.parameters[at] * runs.tokens[at])).mean())
            best.append((spent, np.exp(vertex), spent / flops / np.exp(vertex)))
    return _power_laws(best)


def simulate(
    law: Law,
    parameters: ArrayLike,
    tokens: ArrayLike,
    *,
    noise: float = 0.0,
    generator: np.random.Generator | None = None,
    flops: float = 6.0,
) -> Runs:
    """Make runs that obey a law, up to noise: a planted truth for the fits.

    Args:
        law: the truth.
        parameters: N, broadcast against ``tokens``.
        tokens: D.
        noise: standard deviation of the log loss.
        generator: NumPy's; needed where there is noise.
        flops: operations for each parameter and token.
    Returns:
        The runs, flattened.
    Raises:
        ValueError: noise without a generator.
    """
    size, data = (x.ravel() for x in np.broadcast_arrays(np.asarray(parameters, float), np.asarray(tokens, float)))
    if noise and generator is None:
        raise mismatch("generator", "a NumPy generator, as there is noise", generator)
    factor = np.exp(noise * generator.standard_normal(size.shape)) if noise else 1.0
    return Runs(size, data, flops * size * data, law.loss(size, data) * factor)


def _check(runs: Runs, *, least: int) -> None:
    if len(runs.loss) < least:
        raise mismatch("runs", f"at least {least}", f"{len(runs.loss)}")
    for name, column in zip(Runs._fields, runs, strict=True):
        if not (np.isfinite(column).all() and (column > 0).all()):
            raise mismatch(f"runs.{name}", "finite numbers > 0", "others")


def _power_laws(best: Sequence[tuple[float, float, float]]) -> Optima:
    """Draw the lines through the logarithms of the best N and the best D."""
    if len({size for _, size, _ in best}) < 2:
        raise mismatch("runs", "minima at two or more budgets, of different sizes", f"{len(best)} minima")
    compute, parameters, tokens = (np.array(column) for column in zip(*best, strict=True))
    a, b = (np.polyfit(np.log(compute), np.log(y), 1)[0] for y in (parameters, tokens))
    return Optima(float(a), float(b), compute, parameters, tokens)
