"""Neural processes: distributions over functions, given some of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbook.layers import MultiHeadAttention
from attnbook.models.count import linear, lstm, network
from attnbook.shapes import check_choice, check_count, check_tensor, mismatch, tensor_shape

PATHS = ("none", "mean", "attention")


@dataclass(frozen=True)
class NeuralProcessConfig:
    """The shape of a :class:`NeuralProcess`; :meth:`named` gives those of the papers.

    Attributes:
        x_dim: numbers that describe a place.
        y_dim: numbers that describe a value.
        width: E, of all hidden layers and of what is known of a function.
        depth: hidden layers of each network.
        path: what the decoder is told of the context besides the latent: "none", its "mean", or by "attention".
        latent: draw a vector that stands for the function as a whole.
        recurrent: read the places by an LSTM first, in the order given.
        num_heads: of the attention.
    """

    x_dim: int
    y_dim: int
    width: int
    depth: int = 2
    path: str = "mean"
    latent: bool = False
    recurrent: bool = False
    num_heads: int = 4

    def __post_init__(self) -> None:
        for name in ("x_dim", "y_dim", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        check_choice("path", self.path, PATHS)
        if self.path == "none" and not self.latent:
            raise mismatch("path", "'mean' or 'attention' where there is no latent", self.path)

    @classmethod
    def named(cls, name: str, x_dim: int, y_dim: int, width: int, **changes: Any) -> NeuralProcessConfig:
        """Return a published member of the family.

        Args:
            name: "cnp" ({cite}`garnelo2018`), "np" ({cite}`garnelo2018b`), "anp" ({cite}`kim2019`) or "ranp"
                ({cite}`qin2019`).
            x_dim: numbers that describe a place.
            y_dim: numbers that describe a value.
            width: E.
            changes: of the other attributes.
        Raises:
            ValueError: an unknown name.
        """
        family = {
            "cnp": {},
            "np": {"path": "none", "latent": True},
            "anp": {"path": "attention", "latent": True},
            "ranp": {"path": "attention", "latent": True, "recurrent": True},
        }
        return cls(x_dim, y_dim, width, **{**family[check_choice("name", name, tuple(family))], **changes})

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E, inner = self.width, [self.width] * self.depth
        x_dim = E if self.recurrent else self.x_dim
        known = E * (self.latent + (self.path != "none"))
        count = lstm(self.x_dim, E) if self.recurrent else 0
        count += network([known + x_dim, *inner, 2 * self.y_dim])
        count += network([x_dim + self.y_dim, *inner, E]) if self.path != "none" else 0
        count += network([x_dim + self.y_dim, *inner, E]) + network([E, E, 2 * E]) if self.latent else 0
        count += network([x_dim, *inner, E]) + 4 * linear(E, E) if self.path == "attention" else 0
        return count


class Gaussian(NamedTuple):
    """Independent normal distributions.

    Attributes:
        mean: of each.
        deviation: standard deviation of each.
    """

    mean: Tensor
    deviation: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw from each, so that gradients reach mean and deviation."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.deviation * noise

    def log_density(self, value: Tensor) -> Tensor:
        """Return the logarithm of each one's density."""
        z = (value - self.mean) / self.deviation
        return -0.5 * (z.square() + math.log(2 * math.pi)) - self.deviation.log()

    def divergence(self, other: Gaussian) -> Tensor:
        """Return the Kullback–Leibler divergence of each from its counterpart."""
        ratio = (self.deviation / other.deviation).square()
        shift = ((self.mean - other.mean) / other.deviation).square()
        return 0.5 * (ratio + shift - 1 - ratio.log())


def perceptron(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """Make a network of linear layers with ReLU between them.

    Args:
        inputs: width of what it takes.
        width: of the hidden layers.
        depth: number of hidden layers.
        outputs: width of what it gives.
    """
    layers, last = [], inputs
    for _ in range(depth):
        layers += [nn.Linear(last, width), nn.ReLU()]
        last = width
    return nn.Sequential(*layers, nn.Linear(last, outputs))


class NeuralProcess(nn.Module):
    """Predict a function's values at some places from its values at others, with the uncertainty.

    Context pairs are encoded one by one. A conditional neural process ({cite}`garnelo2018`) tells the decoder their
    mean. A neural process ({cite}`garnelo2018b`) draws a latent vector from a distribution made of their mean, so that
    whole functions may be sampled. An attentive one ({cite}`kim2019`) lets each target attend to the context, with
    places as queries and keys. A recurrent attentive one ({cite}`qin2019`) reads the places by an LSTM first. However
    many pairs there are, and in whatever order (the recurrent one excepted), the same network takes them.

    Differs from the papers: {cite}`kim2019` has self-attention among the context pairs as well, in both paths; we leave
    it out. The recurrent form is as we understand it from the abstract and from public code: contexts and targets are
    read separately, by one LSTM, each from the beginning.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: NeuralProcessConfig):
        super().__init__()
        self.config = config
        E, depth = config.width, config.depth
        x_dim = E if config.recurrent else config.x_dim
        self.recurrence = nn.LSTM(config.x_dim, E, batch_first=True) if config.recurrent else None
        pair = x_dim + config.y_dim
        self.pair = perceptron(pair, E, depth, E) if config.path != "none" else None
        self.place = perceptron(x_dim, E, depth, E) if config.path == "attention" else None
        self.attention = MultiHeadAttention(E, config.num_heads) if config.path == "attention" else None
        self.latent_pair = perceptron(pair, E, depth, E) if config.latent else None
        self.latent = perceptron(E, E, 1, 2 * E) if config.latent else None
        known = E * (config.latent + (config.path != "none"))
        self.decoder = perceptron(known + x_dim, E, depth, 2 * config.y_dim)

    def _check(self, x: Tensor, y: Tensor | None, which: str, batch: int) -> None:
        check_tensor(f"{which}_x", x, "B N x_dim")
        if x.shape[0] != batch or x.shape[2] != self.config.x_dim:
            raise mismatch(f"{which}_x", f"shape ({batch}, N, {self.config.x_dim})", tensor_shape(x))
        if y is not None:
            wanted = (*x.shape[:2], self.config.y_dim)
            if check_tensor(f"{which}_y", y, "B N y_dim").shape != wanted:
                raise mismatch(f"{which}_y", f"shape {wanted}", tensor_shape(y))

    def _read(self, x: Tensor) -> Tensor:
        return x if self.recurrence is None else self.recurrence(x)[0]

    def _function(self, x: Tensor, y: Tensor) -> Gaussian:
        """Return the distribution of the latent vector (B, 1, E) given pairs; x has been read."""
        pairs = self.latent_pair(torch.cat([x, y], -1)).mean(1, keepdim=True)
        mean, spread = self.latent(pairs).chunk(2, -1)
        return Gaussian(mean, 0.1 + 0.9 * torch.sigmoid(spread))

    def function(self, x: Tensor, y: Tensor) -> Gaussian:
        """Say what is known of the function as a whole.

        Args:
            x: (B, N, x_dim), places.
            y: (B, N, y_dim), values there.
        Returns:
            The distribution of the latent vector, (B, 1, E).
        Raises:
            ValueError: shapes that do not match, a model without a latent.
        """
        if self.latent is None:
            raise mismatch("config", "latent=True", "latent=False")
        self._check(x, y, "context", len(x))
        return self._function(self._read(x), y)

    def _predict(self, x: Tensor, y: Tensor, target: Tensor, latent: Tensor | None) -> tuple[Gaussian, Tensor | None]:
        known, weights = [] if latent is None else [latent.expand(-1, target.shape[1], -1)], None
        if self.pair is not None:
            pairs = self.pair(torch.cat([x, y], -1))  # (B, N, E)
            if self.attention is None:
                found = pairs.mean(1, keepdim=True).expand(-1, target.shape[1], -1)
            else:
                found, weights = self.attention(self.place(target), self.place(x), pairs, need_weights=True)
            known.append(found)
        mean, spread = self.decoder(torch.cat([*known, target], -1)).chunk(2, -1)
        return Gaussian(mean, 0.1 + 0.9 * nn.functional.softplus(spread)), weights

    def forward(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        *,
        generator: torch.Generator | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Predict the values at some places.

        Args:
            context_x: (B, N, x_dim), places where the value is known.
            context_y: (B, N, y_dim), the values there.
            target_x: (B, M, x_dim), places where it is asked for.
            generator: source of randomness, where there is a latent.
            return_weights: return the weights of the attention too.
        Returns:
            A :class:`Gaussian` over (B, M, y_dim), for one draw of the latent; with return_weights also (B, H, M, N),
            or None without attention.
        Raises:
            ValueError: shapes that do not match.
        """
        self._check(context_x, context_y, "context", len(context_x))
        self._check(target_x, None, "target", len(context_x))
        x, target = self._read(context_x), self._read(target_x)
        latent = None if self.latent is None else self._function(x, context_y).sample(generator)
        predicted, weights = self._predict(x, context_y, target, latent)
        return (predicted, weights) if return_weights else predicted

    def loss(
        self,
        context_x: Tensor,
        context_y: Tensor,
        target_x: Tensor,
        target_y: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return what training makes small: the negative log-likelihood of a target, or a bound on it.

        With a latent, it is the negative evidence lower bound ({cite}`garnelo2018b`): the latent is drawn
        knowing the targets, and its divergence from what the context alone says is added.

        Args:
            context_x: (B, N, x_dim).
            context_y: (B, N, y_dim).
            target_x: (B, M, x_dim); usual to have the context among the targets.
            target_y: (B, M, y_dim).
            generator: source of randomness, where there is a latent.
        Returns:
            Scalar, in nats a target.
        Raises:
            ValueError: shapes that do not match.
        """
        self._check(context_x, context_y, "context", len(context_x))
        self._check(target_x, target_y, "target", len(context_x))
        x, target = self._read(context_x), self._read(target_x)
        latent, divergence = None, 0.0
        if self.latent is not None:
            prior, posterior = self._function(x, context_y), self._function(target, target_y)
            latent = posterior.sample(generator)
            divergence = posterior.divergence(prior).sum((1, 2)).mean() / target_x.shape[1]
        predicted, _ = self._predict(x, context_y, target, latent)
        return divergence - predicted.log_density(target_y).sum(-1).mean()
