"""Losses in the form that :func:`attnbook.train.fit` takes: functions of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attnbook.shapes import check_probability

PADDING = 0


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Average the negative log-likelihood of the next token over all positions.

    Args:
        model: maps tokens (B, L) to logits (B, L, V).
        batch: inputs (B, L) and targets (B, L).
    Returns:
        Scalar, in nats.
    """
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def next_token_loss(*, label_smoothing: float = 0.0) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Return :func:`token_loss` with label smoothing ({cite}`vaswani2017`, §5.4).

    The target becomes a mixture of the true token and the even distribution. Log-probabilities are computed from the
    logits, never by taking the logarithm of a probability, which is 0 when a model is sure.

    Args:
        label_smoothing: share of the target's mass that is spread over all tokens.
    Returns:
        A function of a model and a batch (inputs (B, L), targets (B, L)), giving a scalar, in nats.
    Raises:
        ValueError: a share outside [0, 1).
    """
    check_probability("label_smoothing", label_smoothing)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        logits = model(tokens).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing)

    return loss


def sequence_loss(*, label_smoothing: float = 0.0) -> Callable[[nn.Module, tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Return a loss for sequence-to-sequence models: the average over the target tokens that are no padding.

    Args:
        label_smoothing: share of the target's mass that is spread over all tokens.
    Returns:
        A function of a model and a batch (source (B, S), inputs (B, T), outputs (B, T)), giving a scalar, in nats.
    Raises:
        ValueError: a share outside [0, 1).
    """
    check_probability("label_smoothing", label_smoothing)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        source, inputs, outputs = batch
        logits = model(source, inputs)
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), outputs.flatten(), ignore_index=PADDING, label_smoothing=label_smoothing
        )

    return loss
