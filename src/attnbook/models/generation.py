"""Decoding: how a next token is chosen, and texts grown from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.shapes import check_count, check_tensor, mismatch


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by a temperature: below 1 sharpens the distribution, above 1 flattens it ({cite}`ackley1985`).

    Args:
        logits: (…, V).
        temperature: > 0.
    Returns:
        (…, V).
    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise mismatch("temperature", "a number > 0", temperature)
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most probable tokens, −∞ for the rest ({cite}`fan2018`, §5.4).

    Args:
        logits: (…, V).
        k: how many; ties at the edge are all kept, and a k beyond V keeps everything.
    Returns:
        (…, V).
    Raises:
        ValueError: k below 1.
    """
    k = min(check_count("k", k), logits.shape[-1])
    edge = logits.topk(k, -1).values[..., -1:]
    return logits.masked_fill(logits < edge, float("-inf"))


def keep_nucleus(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities sum to at least p, −∞ for the rest ({cite}`holtzman2020`, §3.1).

    Args:
        logits: (…, V).
        p: in (0, 1]; the most probable token is always kept.
    Returns:
        (…, V).
    Raises:
        ValueError: p outside (0, 1].
    """
    if not 0 < p <= 1:
        raise mismatch("p", "a number in (0, 1]", p)
    if p == 1:
        return logits  # rounding of the sums would lose the least probable
    ordered, index = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # the mass of the tokens that are more probable
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter(-1, index, ordered)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a text, one sampled token after another.

    A model with caches (:class:`~attnbook.models.decoder.Decoder`) reads each token once while all fit its context;
    beyond that, the last ``context_length`` tokens are read anew for each. A recurrent one carries its state along.

    Args:
        model: maps tokens (B, L) to logits (B, L, V); left in the mode that it was in.
        tokens: (B, L) integers, L ≥ 1: the prompt.
        max_new_tokens: how many to add.
        temperature: 0 takes the most probable token (greedy).
        top_k: see :func:`keep_top_k`.
        top_p: see :func:`keep_nucleus`.
        generator: source of randomness.
    Returns:
        (B, L + max_new_tokens): prompt and continuation.
    Raises:
        ValueError: an empty prompt, settings out of range.
    """
    check_tensor("tokens", tokens, "B L", dtypes=(torch.int64,))
    check_count("max_new_tokens", max_new_tokens)
    if temperature < 0:
        raise mismatch("temperature", "a number ≥ 0", temperature)
    limit = model.config.context_length if hasattr(model, "config") else None
    fits = limit is not None and tokens.shape[1] + max_new_tokens <= limit + 1
    caches = model.make_cache(len(tokens), limit) if fits else None
    state, unread = None, tokens
    with _evaluation(model):
        for _ in range(max_new_tokens):
            if hasattr(model, "step"):
                logits, state = model.step(unread, state)
            elif caches is not None:
                logits = model(unread, caches)
            else:
                logits = model(tokens[:, -limit:] if limit else tokens)
            logits = logits[:, -1]
            if temperature == 0:
                unread = logits.argmax(-1, keepdim=True)
            else:
                logits = temper(logits, temperature)
                logits = logits if top_k is None else keep_top_k(logits, top_k)
                logits = logits if top_p is None else keep_nucleus(logits, top_p)
                unread = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, unread], 1)
    return tokens


@torch.no_grad()
def greedy_decode(model: nn.Module, source: Tensor, *, start: int, end: int, max_length: int, **options: Any) -> Tensor:
    """Translate greedily: the most probable token at each step, until the end or the limit.

    Args:
        model: a sequence-to-sequence model with ``encode(source)`` and ``decode_step(tokens, state)``.
        source: what the model's ``encode`` takes: (B, S) integers, padded, or (B, channels, frames) of sound.
        start: the token that begins a target.
        end: the token that ends one.
        max_length: the most tokens to produce, the end included.
        options: passed on to ``encode``, the lengths of recordings say.
    Returns:
        (B, T) integers, T ≤ max_length, without the start; after a row's end, it is filled with ``end``.
    Raises:
        ValueError: another rank, a limit below 1.
    """
    if isinstance(source, Tensor) and source.is_floating_point():
        check_tensor("source", source, "B channels frames")
    else:
        check_tensor("source", source, "B S", dtypes=(torch.int64,))
    check_count("max_length", max_length)
    produced = []
    with _evaluation(model):
        state = model.encode(source, **options)
        token = torch.full((len(source),), start, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while len(produced) < max_length and not done.all():
            logits, state = model.decode_step(token, state)
            token = logits.argmax(-1).masked_fill(done, end)
            done |= token == end
            produced.append(token)
    return torch.stack(produced, 1)
