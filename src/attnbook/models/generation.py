"""Decoding: how a next token is chosen, and texts grown from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbook.cache import Cache
from attnbook.shapes import check_count, check_tensor, mismatch


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """Keep a model in evaluation mode for a while.

    Args:
        model: a module; anything else is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
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


class Choice(NamedTuple):
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token (greedy).
        top_k: see :func:`keep_top_k`.
        top_p: see :func:`keep_nucleus`.
        generator: source of randomness.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def check(self) -> Choice:
        """Return itself; a ValueError where a setting is out of range."""
        if not self.temperature >= 0:
            raise mismatch("temperature", "a number ≥ 0", self.temperature)
        self.probabilities(torch.zeros(1, 1))
        return self

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution to draw from, (…, V), from logits (…, V); all mass on one token at temperature 0."""
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = temper(logits, self.temperature)
        logits = logits if self.top_k is None else keep_top_k(logits, self.top_k)
        logits = logits if self.top_p is None else keep_nucleus(logits, self.top_p)
        return logits.softmax(-1)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose tokens (B, 1) by logits (B, V)."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)


class Reader:
    """Feeds a model what it has not read yet, and keeps what it remembers of the rest.

    A recurrent model carries its state along, one with caches reads each token once while all fit, and any other reads
    the whole text, or its last ``context_length`` tokens, anew for each.

    Args:
        model: maps tokens (B, L) to logits (B, L, V).
        caches: what the text is appended to; None to read anew.
        padding: (B,) integers: how many of a row's first tokens only fill it up.
    """

    def __init__(self, model: Any, caches: list[Cache] | None = None, padding: Tensor | None = None):
        self.model, self.caches, self.padding = model, caches, padding
        self.text = self.state = None
        self.limit = model.config.context_length if hasattr(model, "config") else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read on: tokens (B, L); the logits (B, V) of the one that follows."""
        if hasattr(self.model, "step"):
            logits, self.state = self.model.step(tokens, self.state)
            return logits[:, -1]
        if self.caches is not None:
            options = {} if self.padding is None else {"padding": self.padding}
            at_once = tokens.shape[1]
            if self.caches[0].rolling:  # what fits at once, then one token at a time, each of which drops one
                at_once = max(min(self.caches[0].max_length - self.caches[0].length, at_once), 1)
            logits = self.model(tokens[:, :at_once], self.caches, **options)
            for i in range(at_once, tokens.shape[1]):
                logits = self.model(tokens[:, i : i + 1], self.caches)
            return logits[:, -1]
        self.text = tokens if self.text is None else torch.cat([self.text, tokens], 1)
        seen, options = self.text[:, -self.limit :] if self.limit else self.text, {}
        if self.padding is not None:
            options["padding"] = (self.padding - (self.text.shape[1] - seen.shape[1])).clamp(min=0)
        return self.model(seen, **options)[:, -1]

    def reorder(self, index: Tensor) -> None:
        """Let row b continue what was row ``index[b]``, index (B,)."""
        self.text = None if self.text is None else self.text[index]
        self.padding = None if self.padding is None else self.padding[index]
        self.state = None if self.state is None else tuple(part[:, index] for part in self.state)
        for cache in self.caches or ():
            cache.reorder(index)


def align_right(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Put prompts of different lengths into one batch, their ends aligned.

    Args:
        prompts: (L,) integers each.
    Returns:
        Tokens (B, L), zeros in front of the shorter ones, and how many, (B,); None where all have one length.
    Raises:
        ValueError: no prompts, or an empty one.
    """
    if not prompts:
        raise mismatch("tokens", "at least one prompt", "none")
    for prompt in prompts:
        check_tensor("tokens", prompt, "L", dtypes=(torch.int64,))
    longest = max(map(len, prompts))
    missing = [longest - len(prompt) for prompt in prompts]
    rows = [torch.cat([prompt.new_zeros(n), prompt]) for n, prompt in zip(missing, prompts, strict=True)]
    return torch.stack(rows), torch.tensor(missing, device=rows[0].device) if any(missing) else None


def start_reading(
    model: Any, tokens: Tensor, padding: Tensor | None, new: int, caches: list[Cache] | None, rows: int | None = None
) -> Reader:
    """Make the reader that suits a model and a task.

    Args:
        model: as for :func:`generate`.
        tokens: (B, L), the prompts.
        padding: (B,), of :func:`align_right`.
        new: how many tokens are to follow.
        caches: the caller's, or None for those that the model makes where the text fits its context.
        rows: of the caches to make; B by default.
    Raises:
        ValueError: caches without enough room, or padding for a model that takes none.
    """
    if padding is not None and not hasattr(model, "make_cache"):
        raise mismatch("tokens", "prompts of one length, for a model that takes no padding", "different lengths")
    needed = tokens.shape[1] + new - 1  # the last token is not read
    if caches is None and hasattr(model, "make_cache") and needed <= model.config.context_length:
        caches = model.make_cache(rows or len(tokens), needed)
    elif caches is not None:
        if padding is not None and caches[0].length:
            raise mismatch("caches", "empty ones, with prompts of different lengths", f"{caches[0].length} positions")
        room = min(caches[0].max_length, model.config.context_length) - caches[0].length
        if not caches[0].rolling and needed > room:
            raise mismatch("tokens", f"at most {room - new + 1} with {new} to follow in the caches", tokens)
    return Reader(model, caches, padding)


class Stop:
    """When a row has come to its end.

    Args:
        tokens: any of these ends it.
        strings: any of these in the text of its new tokens ends it.
        tokenizer: turns token numbers (L,) into text by ``decode``; needed for strings.
    Raises:
        ValueError: a token below 0, an empty string, or strings without a tokenizer.
    """

    def __init__(self, tokens: Sequence[int], strings: Sequence[str], tokenizer: Any):
        if isinstance(strings, str):
            raise mismatch("stop_strings", "a list of strings", strings)
        for token in tokens:
            check_count("stop_tokens", token, least=0)
        if not all(isinstance(string, str) and string for string in strings):
            raise mismatch("stop_strings", "no empty string", str(list(strings)))
        if strings and not hasattr(tokenizer, "decode"):
            raise mismatch("tokenizer", "an object with decode(tokens), for stop_strings", tokenizer)
        self.tokens, self.strings, self.tokenizer = tuple(tokens), tuple(strings), tokenizer
        self.new: list[Tensor] = []  # what has been produced, (B,) each

    def check_vocabulary(self, size: int) -> None:
        """Raise a ValueError where a token is not below the vocabulary's size."""
        if self.tokens and max(self.tokens) >= size:
            raise mismatch("stop_tokens", f"tokens below the vocabulary's size, {size}", max(self.tokens))

    def __call__(self, chosen: Tensor) -> Tensor | None:
        """Tell which rows end with the tokens (B,) just chosen: (B,) bool, or None where nothing is asked for."""
        ends = None
        if self.tokens:
            ends = torch.isin(chosen, torch.tensor(self.tokens, device=chosen.device))
        if self.strings:
            self.new.append(chosen)
            texts = [self.tokenizer.decode(row) for row in torch.stack(self.new, 1)]
            found = [any(string in text for string in self.strings) for text in texts]
            ends = torch.tensor(found, device=chosen.device) | (False if ends is None else ends)
        return ends


@torch.no_grad()
def _produce(reader: Reader, tokens: Tensor, new: int, choice: Choice, stop: Stop) -> Iterator[tuple[Tensor, Any]]:
    """Yield tokens (B, 1), and which rows had ended before, (B,) bool or None; such a row repeats its last token."""
    unread, done = tokens, None
    with evaluation(reader.model):
        for i in range(new):
            logits = reader(unread)
            if i == 0:
                stop.check_vocabulary(logits.shape[-1])
            chosen = choice(logits)
            unread = chosen if done is None else torch.where(done[:, None], unread[:, -1:], chosen)
            yield unread, done
            ends = stop(unread[:, 0])
            if ends is not None:
                done = ends if done is None else done | ends
                if done.all():
                    return


def stream(
    model: Any,
    tokens: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    caches: list[Cache] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
) -> Iterator[Tensor]:
    """Continue a text, and hand over each token as soon as it is chosen.

    The model stays in evaluation mode until the last token is taken, or the iterator closed.

    Args:
        model: as for :func:`generate`, and so for all that follow.
        tokens: the prompts.
        max_new_tokens: how many to add at most.
        temperature: 0 is greedy.
        top_k: see :func:`keep_top_k`.
        top_p: see :func:`keep_nucleus`.
        generator: source of randomness.
        caches: where to keep keys and values.
        stop_tokens: tokens that end a row.
        stop_strings: strings that end a row.
        tokenizer: for the strings.
    Returns:
        An iterator over tokens (B,); a row that has ended repeats its last token until all have.
    Raises:
        ValueError: as for :func:`generate`.
    """
    tokens, padding = _prompts(tokens)
    check_count("max_new_tokens", max_new_tokens)
    choice = Choice(temperature, top_k, top_p, generator).check()
    stop = Stop(stop_tokens, stop_strings, tokenizer)
    reader = start_reading(model, tokens, padding, max_new_tokens, caches)
    return (chosen[:, 0] for chosen, _ in _produce(reader, tokens, max_new_tokens, choice, stop))


def _prompts(tokens: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    if isinstance(tokens, (list, tuple)):
        return align_right(tokens)
    return check_tensor("tokens", tokens, "B L", dtypes=(torch.int64,)), None


def generate(
    model: Any,
    tokens: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    caches: list[Cache] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
) -> Tensor | list[Tensor]:
    """Continue a text, one chosen token after another.

    A model with caches (:class:`~attnbook.models.decoder.Decoder`) reads each token once while all fit its context;
    beyond that, the last ``context_length`` tokens are read anew for each. A recurrent one carries its state along.

    Args:
        model: maps tokens (B, L) to logits (B, L, V); left in the mode that it was in.
        tokens: (B, L) integers, L ≥ 1: the prompts; or a list of (L,), whose lengths may differ.
        max_new_tokens: how many to add at most.
        temperature: 0 takes the most probable token (greedy).
        top_k: see :func:`keep_top_k`.
        top_p: see :func:`keep_nucleus`.
        generator: source of randomness.
        caches: of the model's ``make_cache``, of any kind of ``attnbook.cache``; the prompts continue what they
            hold. By default static ones are made where prompts and new tokens fit.
        stop_tokens: any of these ends its row.
        stop_strings: any of these in the text of a row's new tokens ends it.
        tokenizer: turns token numbers (L,) into text by ``decode``; needed for stop_strings.
    Returns:
        (B, L + N): prompts and continuations, N the length of the longest; a row that ended before repeats its last
        token. For a list of prompts a list of texts, each of its own length.
    Raises:
        ValueError: an empty prompt, settings out of range, prompts and new tokens that do not fit the caches given,
            stop tokens beyond the vocabulary, prompts of different lengths for a model that takes no padding.
    """
    listed = isinstance(tokens, (list, tuple))
    tokens, padding = _prompts(tokens)
    check_count("max_new_tokens", max_new_tokens)
    choice = Choice(temperature, top_k, top_p, generator).check()
    stop = Stop(stop_tokens, stop_strings, tokenizer)
    reader = start_reading(model, tokens, padding, max_new_tokens, caches)
    parts, lengths = [tokens], tokens.new_full((len(tokens),), tokens.shape[1])
    for chosen, done in _produce(reader, tokens, max_new_tokens, choice, stop):
        parts.append(chosen)
        lengths += 1 if done is None else ~done
    text = torch.cat(parts, 1)
    if not listed:
        return text
    first = [0] * len(text) if padding is None else padding.tolist()
    return [row[start:end] for row, start, end in zip(text, first, lengths.tolist(), strict=True)]


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
    with evaluation(model):
        state = model.encode(source, **options)
        token = torch.full((len(source),), start, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while len(produced) < max_length and not done.all():
            logits, state = model.decode_step(token, state)
            token = logits.argmax(-1).masked_fill(done, end)
            done |= token == end
            produced.append(token)
    return torch.stack(produced, 1)
