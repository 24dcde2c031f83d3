"""Neural processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnbook.models import NeuralProcess, NeuralProcessConfig
from attnbook.models.neural_process import Gaussian
from helpers import complains

NAMES = ("cnp", "np", "anp", "ranp")
CONFIGS = {name: NeuralProcessConfig.named(name, 2, 1, 16, num_heads=2) for name in NAMES}
CONFIGS["anp without a latent"] = replace(CONFIGS["anp"], latent=False, depth=1)


def functions(count=3, known=5, asked=7, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, known + asked, 2, generator=draw, dtype=dtype)
    slope = torch.randn(count, 1, 2, generator=draw, dtype=dtype)
    y = (slope * x).sum(-1, keepdim=True).sin()
    return x[:, :known], y[:, :known], x[:, known:], y[:, known:]


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_formula_counts_the_parameters(config):
    assert sum(p.numel() for p in NeuralProcess(config).parameters()) == config.num_parameters()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_and_gradients(config):
    model = NeuralProcess(config)
    context_x, context_y, target_x, target_y = functions()
    predicted, weights = model(context_x, context_y, target_x, return_weights=True)
    assert predicted.mean.shape == predicted.deviation.shape == (3, 7, 1)
    assert (predicted.deviation > 0.1).all()
    if config.path == "attention":
        assert weights.shape == (3, 2, 7, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 7))
    else:
        assert weights is None
    model.loss(context_x, context_y, target_x, target_y).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_context_is_a_set(name):
    model = NeuralProcess(CONFIGS[name]).double()
    context_x, context_y, target_x, _ = functions(dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])
    first = model(context_x, context_y, target_x, generator=seeded())
    second = model(context_x[:, order], context_y[:, order], target_x, generator=seeded())
    assert torch.allclose(first.mean, second.mean) == (name != "ranp")  # an LSTM reads in order


@pytest.mark.parametrize("name", ["cnp", "np", "anp"])
def test_targets_do_not_see_each_other(name):
    model = NeuralProcess(CONFIGS[name]).double()
    context_x, context_y, target_x, _ = functions(dtype=torch.float64)
    whole = model(context_x, context_y, target_x, generator=seeded())
    part = model(context_x, context_y, target_x[:, 2:4], generator=seeded())
    torch.testing.assert_close(whole.mean[:, 2:4], part.mean)


def test_one_draw_is_one_function():
    context_x, context_y, target_x, _ = functions()
    for name, varies in (("cnp", False), ("np", True)):
        model = NeuralProcess(CONFIGS[name])
        first, second = (model(context_x, context_y, target_x).mean for _ in range(2))
        assert torch.equal(first, second) != varies


def test_the_mean_path_tells_all_targets_the_same_and_attention_does_not():
    context_x, context_y, target_x, _ = functions()
    for path, same in (("mean", True), ("attention", False)):
        model = NeuralProcess(replace(CONFIGS["cnp"], path=path))
        seen = []
        model.decoder.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0][..., :16]))
        model(context_x, context_y, target_x)
        assert torch.allclose(seen[0][:, 0], seen[0][:, 3], atol=1e-6) == same


def test_gaussians_are_pytorchs():
    draw = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 50, generator=draw, dtype=torch.float64)
    deviation, width = torch.rand(2, 50, generator=draw, dtype=torch.float64) + 0.1
    ours, theirs = Gaussian(mean, deviation), torch.distributions.Normal(mean, deviation)
    torch.testing.assert_close(ours.log_density(other), theirs.log_prob(other))
    expected = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(other, width))
    torch.testing.assert_close(ours.divergence(Gaussian(other, width)), expected)


def test_the_bound_is_the_likelihood_where_targets_say_nothing_new():
    model = NeuralProcess(CONFIGS["np"]).double()
    context_x, context_y, _, _ = functions(dtype=torch.float64)
    loss = model.loss(context_x, context_y, context_x, context_y, generator=seeded())
    predicted = model(context_x, context_y, context_x, generator=seeded())
    torch.testing.assert_close(loss, -predicted.log_density(context_y).mean())
    more = model.loss(context_x[:, :1], context_y[:, :1], context_x, context_y, generator=seeded())
    known = model.function(context_x, context_y).divergence(model.function(context_x[:, :1], context_y[:, :1]))
    assert known.sum() > 0
    torch.testing.assert_close(more - loss, known.sum((1, 2)).mean() / 5)


@pytest.mark.parametrize("name", NAMES)
def test_one_batch_can_be_learned_by_heart(name):
    model, batch = NeuralProcess(CONFIGS[name]), functions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
    assert loss < -0.5  # a deviation of 0.1, the least, gives −1.38; of 1, at best 0.92


MODEL = NeuralProcess(CONFIGS["cnp"])
X, Y, TARGET_X, TARGET_Y = functions()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: NeuralProcessConfig(1, 0, 8), "y_dim: expected an integer ≥ 1, got 0"),
        (
            lambda: NeuralProcessConfig(1, 1, 8, path="none"),
            "path: expected 'mean' or 'attention' where there is no latent, got none",
        ),
        (
            lambda: NeuralProcessConfig.named("gp", 1, 1, 8),
            "name: expected one of 'cnp', 'np', 'anp', 'ranp', got 'gp'",
        ),
        (lambda: MODEL(X[..., :1], Y, TARGET_X), "context_x: expected shape (3, N, 2), got shape (3, 5, 1)"),
        (lambda: MODEL(X, Y[:, :4], TARGET_X), "context_y: expected shape (3, 5, 1), got shape (3, 4, 1)"),
        (lambda: MODEL(X, Y, TARGET_X[:2]), "target_x: expected shape (3, N, 2), got shape (2, 7, 2)"),
        (
            lambda: MODEL(X[:, :0], Y[:, :0], TARGET_X),
            "context_x: expected a tensor (B, N, x_dim) with no empty axis, got float32…",
        ),
        (lambda: MODEL.loss(X, Y, TARGET_X, Y), "target_y: expected shape (3, 7, 1), got shape (3, 5, 1)"),
        (lambda: MODEL.function(X, Y), "config: expected latent=True, got latent=False"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
