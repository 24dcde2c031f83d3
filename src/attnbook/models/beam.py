"""Beam search: several continuations at once, the best of which are kept at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnbook.cache import Cache
from attnbook.models.generation import Stop, evaluation, start_reading
from attnbook.shapes import check_count, check_tensor, mismatch


class Beams(NamedTuple):
    """What beam search found, the best first.

    Attributes:
        tokens: (B, K, N) integers; after a row's end, its last token is repeated.
        scores: (B, K), log-probabilities divided by the length penalty.
    """

    tokens: Tensor
    scores: Tensor


def _search(
    read: Callable[[Tensor], Tensor],
    reorder: Callable[[Tensor], None],
    logits: Tensor,
    num_beams: int,
    steps: int,
    stop: Sequence[int],
    length_penalty: float,
) -> Beams:
    """Search from the logits (B·K, V) of the first new token, all K rows of a batch entry alike."""
    rows, K = len(logits), num_beams
    stops = torch.tensor(stop, dtype=torch.int64, device=logits.device)
    first = torch.arange(rows, device=logits.device).view(-1, K)[:, :1]  # the first row of each batch entry
    total = logits.new_full((rows // K, K), float("-inf"))
    total[:, 0] = 0.0  # all beams are alike at first: only one counts
    text = torch.zeros(rows // K, K, 0, dtype=torch.int64, device=logits.device)
    done = torch.zeros(rows // K, K, dtype=torch.bool, device=logits.device)
    lengths = torch.zeros(rows // K, K, dtype=torch.int64, device=logits.device)
    for step in range(steps):
        gains = logits.log_softmax(-1).view(-1, K, logits.shape[-1])
        if step:  # a beam that has ended goes on in one way, at no cost: by its last token
            stays = torch.full_like(gains, float("-inf")).scatter_(2, text[:, :, -1:], 0.0)
            gains = torch.where(done[:, :, None], stays, gains)
        sums = total[:, :, None] + gains  # (B, K, V)
        penalty = ((5.0 + lengths + (~done).long()) / 6.0) ** length_penalty
        best = (sums / penalty[:, :, None]).flatten(1).topk(K).indices
        beam, token = best // sums.shape[2], best % sums.shape[2]
        total = sums.flatten(1).gather(1, best)
        done, lengths = done.gather(1, beam), lengths.gather(1, beam)
        lengths += (~done).long()
        text = torch.cat([text.gather(1, beam[:, :, None].expand(-1, -1, step)), token[:, :, None]], 2)
        done |= torch.isin(token, stops)
        if done.all() or step == steps - 1:
            break
        reorder((first + beam).flatten())
        logits = read(token.flatten())
    scores = total / ((5.0 + lengths) / 6.0) ** length_penalty
    return Beams(text, scores)


def _check(num_beams: int, length_penalty: float) -> None:
    check_count("num_beams", num_beams)
    if not length_penalty >= 0:
        raise mismatch("length_penalty", "a number ≥ 0", length_penalty)


@torch.no_grad()
def beam_search(
    model: Any,
    tokens: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    length_penalty: float = 0.0,
    caches: list[Cache] | None = None,
) -> Beams:
    """Look for the most probable continuation, keeping the best few at every step ({cite}`sutskever2014`, §3.2).

    Beams that have ended compete on, so that a short one is only lost to better ones.

    Args:
        model: as for :func:`~attnbook.models.generation.generate`.
        tokens: (B, L) integers, L ≥ 1: the prompts.
        num_beams: K; 1 is greedy decoding.
        max_new_tokens: how many to add at most.
        stop_tokens: any of these ends a beam.
        length_penalty: α of ((5 + length) / 6)^α, by which log-probabilities are divided ({cite}`wu2016`, eq. 14); 0
            compares them as they are.
        caches: of the model's ``make_cache``, for B · K rows, static or paged.
    Returns:
        The beams, new tokens only.
    Raises:
        ValueError: an empty prompt, settings out of range, or caches without enough room.
    """
    check_tensor("tokens", tokens, "B L", dtypes=(torch.int64,))
    _check(num_beams, length_penalty)
    check_count("max_new_tokens", max_new_tokens)
    stop = Stop(stop_tokens, (), None)
    rows = tokens.repeat_interleave(num_beams, 0)
    reader = start_reading(model, rows, None, max_new_tokens, caches)
    with evaluation(model):
        logits = reader(rows)
        stop.check_vocabulary(logits.shape[-1])
        read = lambda token: reader(token[:, None])  # noqa: E731
        return _search(read, reader.reorder, logits, num_beams, max_new_tokens, stop.tokens, length_penalty)


def _select(state: Any, index: Tensor) -> Any:
    """Let row b of a state continue what was row ``index[b]``: of its tensors, and of its caches."""
    if isinstance(state, Tensor):
        return state[index]
    if isinstance(state, Cache):
        state.reorder(index)
        return state
    if isinstance(state, list):
        return [_select(part, index) for part in state]
    if isinstance(state, tuple):
        return type(state)(*(_select(part, index) for part in state))
    return state


@torch.no_grad()
def beam_decode(
    model: Any,
    source: Tensor,
    *,
    start: int,
    end: int,
    max_length: int,
    num_beams: int,
    length_penalty: float = 0.0,
) -> Beams:
    """Translate by beam search, where :func:`~attnbook.models.generation.greedy_decode` takes the first best.

    Args:
        model: a sequence-to-sequence model with ``encode(source)`` and ``decode_step(tokens, state)``.
        source: (B, S) integers, padded.
        start: the token that begins a target.
        end: the token that ends one.
        max_length: the most tokens to produce, the end included.
        num_beams: K.
        length_penalty: as for :func:`beam_search`.
    Returns:
        The beams, without the start; after a row's end, filled with ``end``.
    Raises:
        ValueError: another rank, settings out of range.
    """
    check_tensor("source", source, "B S", dtypes=(torch.int64,))
    _check(num_beams, length_penalty)
    check_count("max_length", max_length)
    with evaluation(model):
        state = model.encode(source.repeat_interleave(num_beams, 0))

        def read(token: Tensor) -> Tensor:
            nonlocal state
            logits, state = model.decode_step(token, state)
            return logits

        def reorder(index: Tensor) -> None:
            nonlocal state
            state = _select(state, index)

        logits = read(source.new_full((len(source) * num_beams,), start))
        return _search(read, reorder, logits, num_beams, max_length, (end,), length_penalty)
