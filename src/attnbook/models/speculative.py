"""Speculative decoding: a small model guesses ahead, the large one checks all guesses in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnbook.models.generation import Choice, evaluation
from attnbook.shapes import check_count, check_tensor, mismatch


class Speculation(NamedTuple):
    """What speculative decoding made.

    Attributes:
        tokens: (1, L + N): prompt and continuation.
        proposed: how many tokens the draft model guessed.
        accepted: how many of them were kept.
        passes: how often the large model read.
    """

    tokens: Tensor
    proposed: int
    accepted: int
    passes: int


def accept(
    proposed: Tensor, draft: Tensor, target: Tensor, *, generator: torch.Generator | None = None
) -> tuple[int, Tensor]:
    """Keep as many guesses as the target distribution allows, and choose the token after them.

    The guess x is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from
    max(0, p − q), normalised. What comes out is distributed by p, whatever q is ({cite}`leviathan2023`, §2.3 and A.1;
    {cite}`chen2023`, theorem 1).

    Args:
        proposed: (n,) integers, drawn from the draft's distributions.
        draft: (n, V), q: the draft's distribution at each.
        target: (n + 1, V), p: the target's at each, and after the last.
        generator: source of randomness.
    Returns:
        How many guesses are kept, and the token that follows them, (1,).
    """
    guesses = proposed[:, None]
    ratios = (target[:-1].gather(1, guesses) / draft.gather(1, guesses))[:, 0]
    kept = torch.rand(len(proposed), generator=generator, device=ratios.device) < ratios
    count = int(kept.long().cumprod(0).sum())
    left = target[count]
    if count < len(proposed):
        left = (left - draft[count]).clamp(min=0)
        if not left.sum() > 0:  # equal distributions, up to rounding
            left = target[count]
    return count, torch.multinomial(left, 1, generator=generator)


class _Scorer:
    """Scores the end of a text that grows, and at times shrinks; reads each token once where the model has caches."""

    def __init__(self, model: Any, length: int):
        self.model = model
        self.caches = model.make_cache(1, length) if hasattr(model, "make_cache") else None

    def __call__(self, text: Tensor, last: int) -> Tensor:
        """Return the logits (last, V) after each of the last tokens of a text (1, L)."""
        if self.caches is None:
            return self.model(text)[0, -last:]
        read = min(self.caches[0].length, text.shape[1] - last)  # what was read beyond was not accepted
        for cache in self.caches:
            cache.truncate(read)
        return self.model(text[:, read:], self.caches)[0, -last:]


@torch.no_grad()
def speculate(
    model: Any,
    draft: Any,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    draft_length: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Continue a text as :func:`~attnbook.models.generation.generate` would, with fewer passes of the model.

    Its distribution is that of the model alone ({cite}`leviathan2023`, alg. 1; {cite}`chen2023`, alg. 2); at
    temperature 0 so is the text, token by token.

    Args:
        model: maps tokens (B, L) to logits (B, L, V).
        draft: a smaller one over the same vocabulary.
        tokens: (1, L) integers, L ≥ 1: the prompt.
        max_new_tokens: how many to add.
        draft_length: how many tokens to guess before each check.
        temperature: 0 takes the most probable token (greedy).
        top_k: see :func:`~attnbook.models.generation.keep_top_k`.
        top_p: see :func:`~attnbook.models.generation.keep_nucleus`.
        generator: source of randomness.
    Returns:
        The text, and how many guesses were made and kept.
    Raises:
        ValueError: more than one row, an empty prompt, settings out of range, more tokens than a model's context, or
            vocabularies that differ.
    """
    check_tensor("tokens", tokens, "B L", dtypes=(torch.int64,))
    if len(tokens) != 1:
        raise mismatch("tokens", "one row: rows would keep different numbers of guesses", tokens)
    check_count("draft_length", draft_length)
    end = tokens.shape[1] + check_count("max_new_tokens", max_new_tokens)
    choice = Choice(temperature, top_k, top_p, generator).check()
    for one in (model, draft):
        if hasattr(one, "config") and end - 1 > one.config.context_length:
            room = one.config.context_length - max_new_tokens + 1
            raise mismatch("tokens", f"at most {room} with {max_new_tokens} to follow", tokens)
    sizes = [one.config.vocab_size for one in (model, draft) if hasattr(one, "config")]
    if len(set(sizes)) > 1:
        raise mismatch("draft", f"a vocabulary of {sizes[0]}", f"{sizes[1]}")
    large, small = _Scorer(model, end), _Scorer(draft, end)
    text, proposed, accepted, passes = tokens, 0, 0, 0
    with evaluation(model), evaluation(draft):
        while text.shape[1] < end:
            guesses, distributions = text, []
            for _ in range(min(draft_length, end - text.shape[1] - 1)):
                distributions.append(choice.probabilities(small(guesses, 1)))
                drawn = torch.multinomial(distributions[-1], 1, generator=generator)
                guesses = torch.cat([guesses, drawn], 1)
            number = len(distributions)
            target = choice.probabilities(large(guesses, number + 1))
            if number and distributions[0].shape[1] != target.shape[1]:
                raise mismatch("draft", f"a vocabulary of {target.shape[1]}", f"{distributions[0].shape[1]}")
            q = torch.cat(distributions) if number else target[:0]
            count, following = accept(guesses[0, text.shape[1] :], q, target, generator=generator)
            text = torch.cat([guesses[:, : text.shape[1] + count], following[None]], 1)
            proposed, accepted, passes = proposed + number, accepted + count, passes + 1
    return Speculation(text, proposed, accepted, passes)
