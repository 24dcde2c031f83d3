"""Random features: unbiased where they are said to be, with errors that fall as they are said to."""

from __future__ import annotations

import math

import pytest
import torch

import attnbook
from attnbook import reference
from attnbook.mechanisms import performer_attention, random_feature_attention
from attnbook.mechanisms.random_features import gaussian_projection, positive_exponents
from helpers import array, assert_close, complains

COUNTS = (32, 128, 512, 2048)


def inputs(size: float = 1.0):
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, 24, d, dtype=torch.float64, generator=generator) for d in (8, 8, 4))
    return q * size, k * size, v


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def errors(function, expected, seeds: int, **options) -> list[list[float]]:
    """Return the root mean square error for each number of features and each seed."""

    def error(m, seed):
        output = function(num_features=m, generator=torch.Generator().manual_seed(seed), **options)
        return float((output - torch.from_numpy(expected)).square().mean().sqrt())

    return [[error(m, 1000 * m + seed) for seed in range(seeds)] for m in COUNTS]


def exponent(table: list[list[float]]) -> tuple[float, float]:
    """Fit log error = a + b log m to the seeds' values; return b and its standard error."""
    x = torch.tensor(COUNTS, dtype=torch.float64).log()[:, None].expand(-1, len(table[0])).flatten()
    y = torch.tensor(table, dtype=torch.float64).log().flatten()
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    rest = y - y.mean() - slope * dx
    return slope, float((rest @ rest / (len(y) - 2) / (dx @ dx)).sqrt())


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("orthogonal", [False, True], ids=["independent", "orthogonal"])
def test_the_performers_error_falls_as_the_root_of_the_number_of_features(orthogonal, is_causal):
    q, k, v = inputs(0.25)
    expected = reference.attention(*map(array, (q, k, v)), is_causal=is_causal)
    options = {"query": q, "key": k, "value": v, "is_causal": is_causal, "orthogonal": orthogonal}
    slope, deviation = exponent(errors(performer_attention, expected, 12, **options))
    assert deviation < 0.04
    assert abs(slope + 0.5) < max(0.05, 3 * deviation)


def test_for_long_vectors_the_law_sets_in_later():
    # Squared lengths of q + k around 6 after scaling, up to 15: e⁶ = 400 features are few, e¹⁵ are out of reach.
    q, k, v = inputs(1.0)
    expected = reference.attention(*map(array, (q, k, v)))
    slope, _ = exponent(errors(performer_attention, expected, 8, query=q, key=k, value=v))
    assert -0.35 < slope < 0


@pytest.mark.parametrize("bandwidth", [1.0, 1.5])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_rfas_error_falls_as_the_root_of_the_number_of_features(bandwidth, is_causal):
    q, k, v = inputs()
    arrays = map(array, (unit(q), unit(k), v))
    expected = reference.attention(*arrays, scale=bandwidth**-2, is_causal=is_causal)
    options = {"query": q, "key": k, "value": v, "is_causal": is_causal, "bandwidth": bandwidth}
    slope, deviation = exponent(errors(random_feature_attention, expected, 12, **options))
    assert deviation < 0.05
    assert abs(slope + 0.5) < max(0.05, 3 * deviation)


def estimates(x, y, orthogonal: bool, m: int, draws: int):
    """Estimate exp(x·y) many times."""
    w = [gaussian_projection(m, len(x), orthogonal=orthogonal, dtype=torch.float64) for _ in range(draws)]
    w = torch.stack(w)  # (draws, m, D)
    phi_x, phi_y = (positive_exponents(z.expand(draws, 1, -1), w).exp() for z in (x, y))
    return (phi_x * phi_y).mean(-1)[:, 0]


@pytest.mark.parametrize("orthogonal", [False, True], ids=["independent", "orthogonal"])
@pytest.mark.parametrize("angle", [0.0, 1.0, math.pi])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_positive_features_are_unbiased(orthogonal, angle, dim):
    x = torch.zeros(dim, dtype=torch.float64)
    x[0] = 0.8
    y = x * math.cos(angle)
    if dim > 1:
        y[1] = 0.8 * math.sin(angle)
    found = estimates(x, y, orthogonal, 10, 3000)
    deviation = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - (x @ y).exp()) <= 4 * deviation + 1e-12


def test_without_its_signs_qr_would_be_biased():
    # With one dimension, Q is 1 or −1: the sign is all there is to draw, and LAPACK always draws the same.
    q, _ = torch.linalg.qr(torch.randn(1000, 1, 1, dtype=torch.float64))
    assert q.unique().numel() == 1
    drawn = gaussian_projection(1000, 1, dtype=torch.float64)
    assert abs((drawn > 0).double().mean() - 0.5) < 0.08


def test_orthogonal_features_vary_less():
    x, y = (torch.randn(8, dtype=torch.float64) * 0.5 for _ in range(2))
    independent, orthogonal = (estimates(x, y, kind, 8, 6000).var() for kind in (False, True))
    assert orthogonal < 0.97 * independent


def test_orthogonal_vectors_are_orthogonal_in_blocks_and_long_as_gaussian_ones():
    w = gaussian_projection(22, 8, dtype=torch.float64)
    assert w.shape == (22, 8)
    for block in w.split(8):
        products = block @ block.T
        assert_close(products - products.diag().diag(), torch.zeros_like(products))
    lengths = gaussian_projection(8000, 8, dtype=torch.float64).square().sum(-1)
    assert lengths.mean() == pytest.approx(8, rel=0.03)  # χ² with 8 degrees of freedom
    assert lengths.var() == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("function", [performer_attention, random_feature_attention])
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_the_forms_agree(function, form):
    q, k, v = inputs()
    w = torch.randn(2, 16, 8, dtype=torch.float64)  # vectors of its own for each head
    chunked = function(q, k, v, projection=w, is_causal=True, chunk_size=5)
    assert_close(function(q, k, v, projection=w, is_causal=True, form=form), chunked, times=10)
    assert_close(
        chunked,
        getattr(reference, function.__name__)(*map(array, (q, k, v)), projection=array(w), is_causal=True),
        times=10,
    )


@pytest.mark.parametrize("function", [performer_attention, random_feature_attention])
def test_a_generator_decides_everything(function):
    q, k, v = (x.float() for x in inputs())
    first, second, other = (function(q, k, v, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_long_vectors_neither_overflow_nor_vanish():
    q, k, v = (x.float() for x in inputs())
    exact = performer_attention(q.double() * 12, k.double() * 12, v.double(), projection=torch.randn(16, 8).double())
    assert exact.isfinite().all()
    output = performer_attention(q * 30, k * 30, v, projection=torch.randn(16, 8))
    assert output.isfinite().all()
    assert output.abs().sum() > 0


def test_masked_keys_do_not_set_the_scale():
    q, k, v = (x.float() for x in inputs())
    k[:, :, 0] = 0  # the largest exponents there are
    k[:, :, 1:] *= 20
    mask = (torch.arange(24) > 0)[None, None, None]
    w = torch.randn(16, 8)
    output = performer_attention(q, k, v, projection=w, attn_mask=mask)
    assert_close(output, performer_attention(q, k[:, :, 1:], v[:, :, 1:], projection=w), times=10)
    assert output.abs().sum() > 0


def test_rfa_sees_directions_only():
    q, k, v = inputs()
    w = torch.randn(64, 8, dtype=torch.float64)
    longer = random_feature_attention(q * 7, k * torch.rand(1, 2, 24, 1).double(), v, projection=w)
    assert_close(longer, random_feature_attention(q, k, v, projection=w), times=10)
    zero = torch.zeros_like(q, requires_grad=True)
    output = random_feature_attention(zero, k, v, projection=w)
    (gradient,) = torch.autograd.grad(output.sum(), zero)
    assert output.isfinite().all()
    assert gradient.isfinite().all()


def test_generalised_kernels_are_linear_attention():
    # torch_geometric's Performer layer has ReLU features of random projections, plus a constant.
    layer = pytest.importorskip("torch_geometric.nn.attention.performer").PerformerProjection(8)
    q, k, v = (x.float() for x in inputs())
    w = layer.projection_matrix
    output = attnbook.mechanisms.linear_attention(q, k, v, feature_map=lambda x: (x @ w.T).relu() + 1e-3)
    assert_close(output, layer(q, k, v).double(), times=4)


GOOD = torch.zeros(2, 4, 3, 8)
BAD = {
    "num_features: expected an integer ≥ 1, got 0": {"num_features": 0},
    "projection: expected (m, D) or (H, m, D) with H = 4, D = 8, got shape (5, 7)": {"projection": torch.ones(5, 7)},
    "projection: expected (m, D) or (H, m, D) with H = 4, D = 8, got shape (3, 5, 8)": {
        "projection": torch.ones(3, 5, 8)
    },
    "projection: expected no NaN, got 40 NaN of 40 elements": {"projection": torch.full((5, 8), math.nan)},
    "chunk_size: expected an integer ≥ 1, got 0": {"chunk_size": 0},
    "form: expected one of 'parallel', 'chunked', 'recurrent', got 'fast'": {"form": "fast"},
    "attn_mask: expected a mask of keys, …": {"attn_mask": torch.ones(3, 3, dtype=torch.bool)},
}


@pytest.mark.parametrize("function", [performer_attention, random_feature_attention])
@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(function, text, arguments):
    with complains(text):
        function(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})


def test_factors_must_be_positive():
    with complains("scale: expected a finite number > 0, got 0"):
        performer_attention(GOOD, GOOD, GOOD, scale=0)
    with complains("bandwidth: expected a finite number > 0, got -1.0"):
        random_feature_attention(GOOD, GOOD, GOOD, bandwidth=-1.0)
