"""Groups of parameters that an optimiser treats differently, and their average over the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.shapes import check_probability, mismatch


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices and embeddings decay, biases and norms do not.

    Args:
        model: any.
        weight_decay: of the matrices.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]


class EMA:
    """An exponential moving average of a model's trainable weights.

    After step t the average moves towards the weights by 1 − min(decay, (1 + t) / (10 + t)): the first weights, which
    are random, are soon forgotten, however long the memory. Buffers are not averaged.

    Args:
        model: whose weights are averaged; the average starts from them.
        decay: the share of the average that each step keeps, in the long run.
    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.updates = check_probability("decay", decay), 0
        self.average = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the model's weights, in one order; move averages to where the weights are."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if parameters.keys() != self.average.keys():
            different = sorted(parameters.keys() ^ self.average.keys())
            raise mismatch("model", "the model that is averaged", f"one that differs in {different[0]}")
        for name, parameter in parameters.items():
            if self.average[name].device != parameter.device:
                self.average[name] = self.average[name].to(parameter.device)
        return [self.average[name] for name in parameters], [p.detach() for p in parameters.values()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights; called after each step.

        Args:
            model: the one that is averaged.
        Raises:
            ValueError: another model.
        """
        average, weights = self._pairs(model)
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(average, weights, 1 - kept)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model's weights by the average.

        Args:
            model: the one that is averaged, or one of the same shape.
        """
        average, weights = self._pairs(model)
        torch._foreach_copy_(weights, average)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the average as its weights for a while.

        Args:
            model: the one that is averaged.
        """
        _, weights = self._pairs(model)
        kept = [weight.clone() for weight in weights]
        self.copy_to(model)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)
