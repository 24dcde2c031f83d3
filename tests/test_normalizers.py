"""Normalisers: against the NumPy reference or a formula of their own, and the identities that they obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import attnbook
from attnbook import normalizers, reference
from attnbook.normalizers import NORMALIZERS
from helpers import DTYPES, array, complains, name_of

NAMES = tuple(NORMALIZERS)
SUM_TO_ONE = ("softmax", "scalable_softmax", "adaptive_temperature", "sparsemax", "entmax15", "entmax", "asentmax")
SHIFT_INVARIANT = SUM_TO_ONE  # the others weigh each score against a fixed level
SPARSE = ("sparsemax", "entmax15", "entmax", "asentmax")


def adaptive(z):
    """{cite}`velickovic2025`: the code beside figure 5, with NumPy's polyval."""
    p = reference.softmax(z)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    beta = max(np.polyval([-0.037, 0.481, -2.3, 4.917, -1.791], entropy), 1) if entropy > 0.5 else 1
    return reference.softmax(beta * z)


def expected_rows(name: str, rows: np.ndarray) -> np.ndarray:
    """Normalise each row of a matrix; −∞ is left out."""
    n = rows.shape[-1]
    of_row = {
        **reference.NORMALIZERS,
        "sigmoid": lambda z: 1 / (1 + n * np.exp(-z)),
        "adaptive_temperature": adaptive,
        "entmax": lambda z: reference.entmax(z, 1.5),
        "asentmax": lambda z: reference.entmax((1 + np.log(len(z))) * z if len(z) > 1 else z, 1.5),
    }[name]
    result = np.zeros_like(rows)
    for row, out in zip(rows, result, strict=True):
        kept = row > -np.inf
        if kept.any():
            out[kept] = of_row(row[kept])
    return result


def draw(*shape: int, dtype: torch.dtype = torch.float64, size: float = 2.0) -> torch.Tensor:
    return (size * torch.randn(*shape, dtype=torch.float64)).to(dtype)


# Weights are computed in float32 at least; half precision rounds them once, at the end.
ATOL = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("length", [1, 2, 7, 63, 100])
def test_equals_the_reference(name, dtype, length):
    scores = draw(20, length, dtype=dtype)
    scores[3, length // 2 :] = -math.inf
    scores[7] = -math.inf
    weights = NORMALIZERS[name](scores)
    assert weights.dtype == dtype
    np.testing.assert_allclose(array(weights), expected_rows(name, array(scores)), rtol=0, atol=ATOL[dtype])
    assert (weights[7] == 0).all()
    assert (weights[3, length // 2 :] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis_may_be_normalised(name, dim):
    scores = draw(4, 5, 6)
    mask = torch.rand(4, 5, 6) < 0.7
    found = NORMALIZERS[name](scores, mask=mask, dim=dim)
    rows = scores.masked_fill(~mask, -math.inf).movedim(dim, -1)
    expected = expected_rows(name, array(rows.reshape(-1, rows.shape[-1]))).reshape(rows.shape)
    np.testing.assert_allclose(array(found.movedim(dim, -1)), expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_empty_rows_give_zero_weights_and_gradients(name, dtype):
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    for scores, options in (
        (draw(3, 3, dtype=dtype), {"mask": mask}),
        (draw(3, 3, dtype=dtype).masked_fill(~mask, -math.inf), {}),
        (torch.full((3, 3), -math.inf, dtype=dtype), {}),
    ):
        scores.requires_grad_()
        weights = NORMALIZERS[name](scores, **options)
        assert weights.isfinite().all()
        assert (weights[1] == 0).all()
        assert (weights[~mask] == 0).all() or not options
        (gradient,) = torch.autograd.grad(weights[..., 0].sum() + weights.square().sum(), scores)
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    scores = draw(3, 6)
    scores[0, 2] = -math.inf
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True], [False] * 6])
    finite = scores.masked_fill(scores == -math.inf, 0).requires_grad_()

    def call(z):
        return NORMALIZERS[name](z.masked_fill(scores == -math.inf, -math.inf), mask=mask)

    assert torch.autograd.gradcheck(call, finite)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0, 2.5, 4.0])
def test_gradcheck_of_entmax(alpha):
    assert torch.autograd.gradcheck(lambda z: normalizers.entmax(z, alpha), draw(4, 7).requires_grad_())


def test_gradcheck_of_learned_strengths():
    scores, strength, delta, beta, gamma = (
        x.requires_grad_() for x in (draw(2, 5), *(1 + torch.rand(4, 2, 1, dtype=torch.float64)))
    )
    assert torch.autograd.gradcheck(lambda z, s: normalizers.scalable_softmax(z, strength=s), (scores, strength))
    assert torch.autograd.gradcheck(
        lambda z, d, b, g: normalizers.asentmax(z, delta=d, beta=b, gamma=g), (scores, delta, beta, gamma)
    )


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_unchanged(name):
    scores = draw(2, 5)
    scores[0, 0] = -math.inf
    before = scores.clone()
    NORMALIZERS[name](scores, mask=torch.rand(5) < 0.5)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_extreme_scores_stay_finite(name, dtype):
    big = 3e4 if dtype == torch.float16 else 1e30
    scores = torch.tensor([[big, 0.0, -big], [-big, -big, -big], [big, big, 0.0]], dtype=dtype)
    scores.requires_grad_()
    weights = NORMALIZERS[name](scores)
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert weights.isfinite().all()
    assert gradient.isfinite().all()
    assert weights[0].tolist() == [1, pytest.approx(0.25, abs=0.001) if name == "sigmoid" else 0, 0]
    if name in SUM_TO_ONE:
        assert weights[1].sum().item() == pytest.approx(1, abs=0.01)
        assert weights[2, :2].tolist() == [0.5, 0.5]
    else:
        assert weights[1].tolist() == [0, 0, 0]


def test_scalable_softmax_counts_beyond_the_range_of_half_precision():
    weights = normalizers.scalable_softmax(torch.zeros(70_000, dtype=torch.float16))
    assert weights.sum(dtype=torch.float32).item() == pytest.approx(1, abs=0.01)


def test_asentmax_admits_negative_exponents_where_one_position_is_left():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    scores = draw(2, 3).requires_grad_()
    gamma = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    weights = normalizers.asentmax(scores, mask=mask, gamma=gamma)
    assert weights[0].tolist() == [1, 0, 0]
    expected = reference.entmax((1 + 1 / math.log(3)) * array(scores)[1])
    np.testing.assert_allclose(array(weights[1]), expected, atol=1e-12)
    for gradient in torch.autograd.grad(weights.square().sum(), (scores, gamma)):
        assert gradient.isfinite().all()


rows = arrays(np.float64, st.integers(1, 12), elements=st.floats(-8, 8, width=32)).map(torch.from_numpy)
alphas = st.floats(1.0, 4.0, exclude_min=True)


@given(rows, st.floats(-5, 5), st.sampled_from(SHIFT_INVARIANT))
def test_a_common_shift_changes_nothing(scores, shift, name):
    assume(name != "adaptive_temperature" or not near_threshold(scores))
    normalize = NORMALIZERS[name]
    assert torch.allclose(normalize(scores + shift), normalize(scores), rtol=0, atol=1e-9)


def near_threshold(scores):
    """adaptive_temperature jumps where the entropy is 0.5: a rounding may decide there."""
    p = torch.softmax(scores, -1)
    return abs(-(p * p.clamp(min=1e-300).log()).sum() - 0.5) < 1e-6


@given(rows, st.randoms(use_true_random=False), st.sampled_from(NAMES))
def test_permuted_scores_give_permuted_weights(scores, random, name):
    assume(name != "adaptive_temperature" or not near_threshold(scores))
    order = list(range(len(scores)))
    random.shuffle(order)
    normalize = NORMALIZERS[name]
    assert torch.allclose(normalize(scores[order]), normalize(scores)[order], rtol=0, atol=1e-9)


@given(rows, st.integers(0, 2**12 - 1), st.sampled_from(NAMES))
def test_a_masked_position_equals_an_absent_one(scores, bits, name):
    mask = torch.tensor([bool(bits >> i & 1) for i in range(len(scores))])
    assume(mask.any())
    assume(name != "adaptive_temperature" or not near_threshold(scores[mask]))
    # The length of the axis, not the number of allowed positions, sets sigmoid's offset: give both the same.
    options = {"offset": -1.0} if name == "sigmoid" else {}
    weights = NORMALIZERS[name](scores, mask=mask, **options)
    assert (weights[~mask] == 0).all()
    assert torch.allclose(weights[mask], NORMALIZERS[name](scores[mask], **options), rtol=0, atol=1e-9)
    by_score = NORMALIZERS[name](scores.masked_fill(~mask, -math.inf), **options)
    assert torch.equal(weights, by_score)


def test_the_offset_of_sigmoid_counts_the_axis():
    mask = torch.tensor([True, True, False, False])
    assert normalizers.sigmoid(torch.zeros(4), mask=mask).tolist() == pytest.approx([0.2, 0.2, 0, 0])
    assert normalizers.sigmoid(torch.zeros(2)).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert normalizers.sigmoid(torch.zeros(2), offset=0.0).tolist() == [0.5, 0.5]


@given(rows, st.sampled_from(SUM_TO_ONE))
def test_weights_are_a_distribution(scores, name):
    weights = NORMALIZERS[name](scores)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


@given(rows)
def test_the_silent_position_takes_the_rest(scores):
    weights = normalizers.softmax_off_by_one(scores)
    with_zero = normalizers.softmax(torch.cat([scores, torch.zeros(1, dtype=torch.float64)]))
    assert torch.allclose(weights, with_zero[:-1], rtol=0, atol=1e-14)
    assert weights.sum() <= 1


@given(rows, st.sampled_from(NAMES))
def test_higher_scores_get_no_lower_weights(scores, name):
    weights = NORMALIZERS[name](scores)
    order = scores.argsort()
    assert (weights[order].diff() >= -1e-12).all()


@given(rows)
def test_entmax_at_two_is_sparsemax(scores):
    expected = reference.sparsemax(scores.numpy())
    np.testing.assert_allclose(normalizers.entmax(scores, 2.0), expected, atol=1e-12)
    np.testing.assert_allclose(normalizers.sparsemax(scores), expected, atol=1e-12)


@given(rows)
def test_entmax_approaches_softmax(scores):
    softmax = torch.softmax(scores, -1)
    far, near = ((normalizers.entmax(scores, a) - softmax).abs().max() for a in (1.01, 1.001))
    assert near <= 0.01
    assert near <= far / 5 + 1e-9  # the difference is of first order in α − 1


@given(rows, rows)
def test_sparsemax_is_the_nearest_point_of_the_simplex(scores, other):
    projection = normalizers.sparsemax(scores)
    size = min(len(scores), len(other))
    point = torch.zeros_like(scores)
    point[:size] = torch.softmax(other[:size], -1)
    # An orthogonal projection p onto a convex set: ⟨z − p, x − p⟩ ≤ 0 for every x of the set.
    assert (scores - projection) @ (point - projection) <= 1e-9
    assert torch.allclose(normalizers.sparsemax(projection), projection, atol=1e-12)


@given(rows, alphas, st.floats(0.05, 2.0))
def test_the_support_shrinks_as_alpha_grows(scores, alpha, step):
    wide, narrow = (normalizers.entmax(scores, a) for a in (alpha, alpha + step))
    # Equal thresholds are decided by rounding: what counts is weight well above zero.
    assert ((narrow > 1e-6) <= (wide > 0)).all()


@given(rows, st.floats(1.05, 4.0))
def test_entmax_equals_bisection(scores, alpha):
    expected = reference.entmax(scores.numpy(), alpha)
    np.testing.assert_allclose(normalizers.entmax(scores, alpha), expected, atol=1e-8)


@given(rows, st.floats(1.05, 4.0))
def test_entmax_maximises_what_it_says(scores, alpha):
    def objective(p):
        return p @ scores + (p - p**alpha).sum() / (alpha * (alpha - 1))

    best = normalizers.entmax(scores, alpha)
    for other in (torch.softmax(scores, -1), normalizers.sparsemax(scores), torch.full_like(scores, 1 / len(scores))):
        for share in (0.01, 0.5):
            assert objective((1 - share) * best + share * other) <= objective(best) + 1e-9


@given(rows)
def test_scaling_laws_of_the_scalable_forms(scores):
    n = len(scores)
    expected = torch.softmax(scores * 2 * math.log(n), -1)
    assert torch.allclose(normalizers.scalable_softmax(scores, strength=2.0), expected, atol=1e-12)
    factor = 0.5 + 3 * math.log(n) ** 2
    found = normalizers.asentmax(scores, 2.0, delta=0.5, beta=3.0, gamma=2.0)
    np.testing.assert_allclose(found, reference.sparsemax(factor * scores.numpy()), atol=1e-9)


@given(rows)
def test_adaptive_temperature_never_raises_the_entropy(scores):
    def entropy(p):
        return -(p * p.clamp(min=1e-300).log()).sum()

    before, after = torch.softmax(scores, -1), normalizers.adaptive_temperature(scores)
    assert entropy(after) <= entropy(before) + 1e-9
    if entropy(before) < 0.5 - 1e-6:
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_normalizers_give_exact_zeros(name):
    weights = NORMALIZERS[name](torch.tensor([5.0, 4.9, -5.0]))
    assert weights[2] == 0
    assert (weights[:2] > 0).all()


@pytest.mark.parametrize("dim", [-1, -2, 0])
@pytest.mark.parametrize("name", ["entmax15", "sparsemax", "entmax"])
def test_agrees_with_the_entmax_package(name, dim):
    entmax = pytest.importorskip("entmax", reason="the package entmax, an independent implementation, is not installed")
    scores = draw(5, 6, 7).requires_grad_()
    theirs = {
        "entmax15": lambda: entmax.entmax15(scores, dim=dim),
        "sparsemax": lambda: entmax.sparsemax(scores, dim=dim),
        "entmax": lambda: entmax.entmax_bisect(scores, alpha=1.3, dim=dim, n_iter=80),
    }[name]()
    ours = NORMALIZERS[name](scores, *([1.3] if name == "entmax" else []), dim=dim)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    direction = draw(5, 6, 7)
    gradients = [torch.autograd.grad(w, scores, direction, retain_graph=True)[0] for w in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-6)


def test_where_the_entmax_package_fails_ours_does_not():
    # Measured with entmax 1.3: an error for dim=-2 with k=2, and NaN on a row of −∞.
    scores = torch.stack([torch.full((4,), -math.inf), torch.arange(4.0)])
    assert normalizers.entmax15(scores, dim=-2).isfinite().all()
    assert (normalizers.sparsemax(scores)[0] == 0).all()
    scores = draw(5, 6, 7)
    expected = expected_rows("sparsemax", array(scores.mT.reshape(-1, 6))).reshape(5, 7, 6)
    np.testing.assert_allclose(array(normalizers.sparsemax(scores, dim=-2).mT), expected, atol=1e-12)


def hard_rows(n: int) -> dict[str, torch.Tensor]:
    """Rows that are hard for some way to find the threshold: ties, no spread, a huge one, few scores, an order."""
    one = torch.full((n,), -math.inf, dtype=torch.float64)
    one[n // 2] = 3.0
    return {
        "normal": draw(n, size=1),
        "narrow": draw(n, size=1e-3),
        "wide": draw(n, size=1e4).clamp(-6e4, 6e4),
        "constant": torch.full((n,), 7.25, dtype=torch.float64),
        "two levels": torch.arange(n).remainder(2).double(),
        "tied at the top": torch.arange(n).remainder(3).sub(1).clamp(min=0).double() * 50,
        "one on a plain": torch.zeros(n, dtype=torch.float64).index_fill(0, torch.tensor([n - 1]), 0.5),
        "rising": torch.linspace(-4, 4, n, dtype=torch.float64),
        "falling slowly": -torch.arange(n).double().sqrt() / 20,
        "geometric": 2.0 ** -torch.arange(n).double(),
        "all −∞ but one": one,
        "far from zero": draw(n, size=1) + 1e6,
    }


@pytest.mark.parametrize("n", [5, 127, 128, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_hard_rows_equal_those_that_the_entmax_package_sorts(name, dtype, n):
    entmax = pytest.importorskip("entmax", reason="the package entmax, an independent implementation, is not installed")
    most = torch.finfo(dtype).max
    rows = {what: row.clamp(max=most).to(dtype) for what, row in hard_rows(n).items()}
    stacked = torch.stack(list(rows.values())).requires_grad_()  # some rows with few candidates, some with many
    direction = draw(*stacked.shape).to(dtype)
    together = NORMALIZERS[name](stacked)
    (gradients,) = torch.autograd.grad(together, stacked, direction)
    for i, (what, row) in enumerate(rows.items()):
        row.requires_grad_()
        wide = row.detach().double().requires_grad_()
        theirs = getattr(entmax, name)(wide)
        tolerance = 10 * torch.finfo(dtype).eps
        for ours in (together[i], NORMALIZERS[name](row)):
            np.testing.assert_allclose(array(ours), array(theirs), rtol=tolerance, atol=tolerance, err_msg=what)
        (expected,) = torch.autograd.grad(theirs, wide, direction[i].double())
        (found,) = torch.autograd.grad(NORMALIZERS[name](row), row, direction[i])
        # A position at the threshold is in the support for one and not for the other: leave those rows out.
        if ((array(theirs) > 0) == (array(together[i]) > 0)).all():
            # entmax15's slope is √p, so that a weight that is wrong by ε has a slope that is wrong by √ε.
            slack = 10 * tolerance if name == "sparsemax" else 30 * tolerance**0.5
            for ours in (gradients[i], found):
                np.testing.assert_allclose(array(ours), array(expected), rtol=slack, atol=slack, err_msg=what)


JACOBIANS = {
    "softmax": lambda z, p: np.diag(p) - np.outer(p, p),
    "softmax_off_by_one": lambda z, p: np.diag(p) - np.outer(p, p),
    "sigmoid": lambda z, p: np.diag(p * (1 - p)),
    "scalable_softmax": lambda z, p: np.log(len(z)) * (np.diag(p) - np.outer(p, p)),
    "sparsemax": lambda z, p: of_slopes((p > 0).astype(float)),
    "entmax15": lambda z, p: of_slopes(np.sqrt(p)),
    "entmax": lambda z, p: of_slopes(np.sqrt(p)),
    "asentmax": lambda z, p: (1 + np.log(len(z))) * of_slopes(np.sqrt(p)),
    "adaptive_temperature": lambda z, p: of_tempered(z, p),
}


def of_slopes(s):
    return np.diag(s) - np.outer(s, s) / s.sum()


def of_tempered(z, p):
    """p = softmax(θz) with θ of the entropy of q = softmax(z): (diag(p) − p pᵀ)(θI + z ∇θᵀ), ∇H = −q ∘ (log q + H)."""
    q = reference.softmax(z)
    entropy = -(q * np.log(q)).sum()
    fitted = np.array([-0.037, 0.481, -2.3, 4.917, -1.791])
    free = entropy > 0.5 and np.polyval(fitted, entropy) > 1
    theta = np.polyval(fitted, entropy) if free else 1
    gradient = -float(free) * np.polyval(np.polyder(fitted), entropy) * q * (np.log(q) + entropy)
    return (np.diag(p) - np.outer(p, p)) @ (theta * np.eye(len(z)) + np.outer(z, gradient))


@pytest.mark.parametrize("name", NAMES)
def test_the_documented_jacobian_is_that_of_autograd_and_of_differences(name):
    assert "Jacobian" in NORMALIZERS[name].__doc__
    for scores in (draw(6, size=0.3), draw(6, size=2.0), torch.cat([draw(40, size=0.5), draw(60) - 9])):
        weights = array(NORMALIZERS[name](scores))
        documented = JACOBIANS[name](array(scores), weights)
        found = torch.autograd.functional.jacobian(NORMALIZERS[name], scores)
        np.testing.assert_allclose(array(found), documented, atol=1e-9)
        step = 1e-6 * torch.eye(len(scores), dtype=torch.float64)
        moved = [array(NORMALIZERS[name](scores + sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose((moved[0] - moved[1]).T / 2e-6, documented, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0])
def test_newton_needs_no_more_steps_than_proved(alpha, dtype):
    from attnbook.normalizers import sparse

    exponent = round(1 / (alpha - 1), 9)
    rows = torch.stack(list(hard_rows(1000).values())).to(dtype)
    relative = sparse._Rows.relative(rows, rows.amax(-1, keepdim=True), exponent)
    sigma = torch.zeros(len(rows), 1, dtype=dtype)
    for _ in range(sparse._most_steps(1000, exponent, dtype)):
        sigma = sigma + sparse._newton_step(relative, sigma, exponent)
    total = relative.total(sparse._powers(relative.values, sigma, exponent)[0])
    assert (total - 1).abs().max() <= 1000 * exponent * torch.finfo(dtype).eps  # that many roundings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_compiles_into_one_graph(name):
    compiled = torch.compile(NORMALIZERS[name], fullgraph=True, backend="aot_eager")
    rows = torch.stack(list(hard_rows(150).values())).float().requires_grad_()
    mask = torch.rand(rows.shape) < 0.8
    mask[3] = False
    ours, graph = (normalize(rows, mask=mask) for normalize in (NORMALIZERS[name], compiled))
    assert torch.allclose(ours, graph, rtol=0, atol=2e-6)
    assert (graph[3] == 0).all()
    direction = torch.randn(rows.shape)
    gradients = [torch.autograd.grad(weights, rows, direction)[0] for weights in (ours, graph)]
    assert torch.allclose(*gradients, rtol=0, atol=2e-2)  # where a weight is about 1e-7, √p is its gradient's slope


def test_resolve():
    assert normalizers.resolve("sparsemax") is normalizers.sparsemax
    own = lambda scores, *, mask=None: scores  # noqa: E731
    assert normalizers.resolve(own) is own
    with complains("normalizer: expected one of 'softmax', …, 'asentmax', got 'hardmax'"):
        normalizers.resolve("hardmax")


def test_all_have_the_signature_of_the_contract():
    assert set(NAMES) == {
        "softmax",
        "softmax_off_by_one",
        "scalable_softmax",
        "adaptive_temperature",
        "sigmoid",
        "sparsemax",
        "entmax15",
        "entmax",
        "asentmax",
    }
    for name in NAMES:
        assert getattr(attnbook.normalizers, name) is NORMALIZERS[name]


def test_values_are_not_looked_at_under_vmap():
    scores = draw(3, 4, 5)
    scores[0, 0] = -math.inf
    for name in NAMES:
        if name in SPARSE:
            continue  # an autograd.Function without a rule for vmap
        found = torch.vmap(NORMALIZERS[name])(scores)
        assert torch.allclose(found, NORMALIZERS[name](scores)), name


Z = torch.zeros(2, 3)
BAD = {
    "scores: expected no NaN, got 1 NaN of 3 elements": {"scores": torch.tensor([0.0, math.nan, 1.0])},
    "scores: expected finite values or −inf, got +inf": {"scores": torch.tensor([0.0, math.inf])},
    "scores: expected a tensor (...), got list": {"scores": [0.0]},
    "scores: expected a tensor (...) with no empty axis, got float32 tensor of shape (2, 0)": {"scores": Z[:, :0]},
    "scores: expected a float64 or float32 or float16 or bfloat16 tensor, got int64 tensor of shape (2, 3)": {
        "scores": Z.long()
    },
    "dim: expected an axis of scores, in [-2, 1], got 2": {"dim": 2},
    "dim: expected an axis of scores, in [-2, 1], got -3": {"dim": -3},
    "dim: expected an axis of scores, in [-2, 1], got None": {"dim": None},
    "dim: expected an axis of scores, in [-2, 1], got True": {"dim": True},
    "mask: expected a bool tensor (True = may attend), got float32 tensor of shape (2, 3)": {"mask": Z},
    "mask: expected broadcastable to (*scores.shape) = (2, 3), got bool tensor of shape (3, 2)": {
        "mask": torch.ones(3, 2, dtype=torch.bool)
    },
    "mask: expected broadcastable to (*scores.shape) = (2, 3), got bool tensor of shape (4, 2, 3)": {
        "mask": torch.ones(4, 2, 3, dtype=torch.bool)
    },
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(name, text, arguments):
    with complains(text):
        NORMALIZERS[name](**{"scores": Z, **arguments})


@pytest.mark.parametrize("alpha", [1, 1.0, 0.9, -1, math.inf, math.nan, True, "2", None])
@pytest.mark.parametrize("normalize", [normalizers.entmax, normalizers.asentmax])
def test_a_bad_alpha_is_named(normalize, alpha):
    with complains(f"alpha: expected a finite number > 1 (α = 1 is softmax), got {alpha!r}"):
        normalize(Z, alpha)


def test_nan_that_a_mask_hides_is_no_nan():
    weights = normalizers.softmax(torch.tensor([0.0, math.nan]), mask=torch.tensor([True, False]))
    assert weights.tolist() == [1, 0]
