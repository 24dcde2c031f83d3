"""The training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.shapes import check_choice, check_count, mismatch
from attnbook.train.schedules import schedule as make_schedule

PRECISIONS = ("no", "bf16", "fp16")


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the model is left as the last good step made it."""


@dataclass
class History:
    """What happened in a run.

    Attributes:
        losses: the training loss of each step.
        evaluations: (steps taken, what ``evaluate`` returned) in order.
        seconds: elapsed, evaluations left out.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, Any]] = field(default_factory=list)
    seconds: float = 0.0


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


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Go through the batches again and again; an iterator that cannot be restarted ends the run when it ends."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise mismatch(
                "batches", "enough batches for all steps, or an iterable that can be gone through again", "the end"
            )


def _accelerator(precision: str) -> Any:
    """Return Accelerate's view of this machine: its GPU where there is one, its processor otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its progress bars miss a widget that nobody here needs
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # each run chooses its precision, whatever the last one chose
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    optimizer: torch.optim.Optimizer | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    schedule: str | Callable[[int], float] = "constant",
    warmup: int = 0,
    final: float = 0.0,
    clip: float | None = None,
    precision: str = "no",
    evaluate: Callable[[nn.Module], Any] | None = None,
    evaluate_every: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> History:
    """Train a model.

    The optimiser is AdamW ({cite}`loshchilov2019`) unless one is passed. Device placement, mixed precision and gradient
    scaling are Accelerate's; it is imported here, not with the package.

    Args:
        model: trained in place; left in training mode, on the machine's accelerator where it has one.
        loss: maps (model, batch) to a scalar.
        batches: gone through again from the start when they end.
        steps: how many updates.
        learning_rate: the peak, for AdamW; of a passed optimiser, the rates of its groups are the peaks.
        optimizer: used instead of AdamW.
        betas: AdamW's.
        weight_decay: AdamW's, of matrices only.
        schedule: a name for :func:`attnbook.train.schedule`, or a function from the step to a factor.
        warmup: steps of linear warm-up.
        final: factor of the rate at the end of "cosine" and "linear".
        clip: the largest norm of the gradient; None leaves it alone.
        precision: "no" (full), "bf16" or "fp16".
        evaluate: called with the model in evaluation mode, without gradients.
        evaluate_every: steps between evaluations; by default there is one, at the end.
        progress: called with the number of steps taken and the last loss.
    Returns:
        Losses, evaluations and time.
    Raises:
        ValueError: settings out of range, too few batches.
        NonFiniteLoss: the loss is NaN or infinite; that step was not taken.
    """
    check_count("steps", steps)
    check_choice("precision", precision, PRECISIONS)
    if not learning_rate > 0:
        raise mismatch("learning_rate", "a number > 0", learning_rate)
    if clip is not None and not clip > 0:
        raise mismatch("clip", "a number > 0 or None", clip)
    every = steps if evaluate_every is None else check_count("evaluate_every", evaluate_every)
    factor = schedule if callable(schedule) else make_schedule(schedule, steps=steps, warmup=warmup, final=final)
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)

    accelerator = _accelerator(precision)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    peaks = [group["lr"] for group in prepared.param_groups]
    history, stream = History(), _endless(batches)
    model.train()
    started = time.perf_counter()
    try:
        for step in range(steps):
            batch = _to(next(stream), accelerator.device)
            for group, peak in zip(prepared.param_groups, peaks, strict=True):
                group["lr"] = peak * factor(step)
            with accelerator.autocast():
                value = loss(wrapped, batch)
            history.losses.append(value.item())
            if not math.isfinite(history.losses[-1]):
                raise NonFiniteLoss(f"step {step}: the loss is {history.losses[-1]}")
            prepared.zero_grad(set_to_none=True)
            accelerator.backward(value)
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            prepared.step()
            if progress is not None:
                progress(step + 1, history.losses[-1])
            if evaluate is not None and ((step + 1) % every == 0 or step + 1 == steps):
                paused = time.perf_counter()
                model.eval()
                with torch.no_grad():
                    history.evaluations.append((step + 1, evaluate(model)))
                model.train()
                started += time.perf_counter() - paused
    finally:  # mixed precision wraps model.forward: give it back as it was
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    history.seconds = time.perf_counter() - started
    return history


def _to(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _to(part, device) for name, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_to(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # a named tuple takes its parts
    return batch
