"""Causal attention with a matrix-valued state: one recurrence, computed whole, in chunks, or token by token.

The state S is a matrix D × Dv, a memory that maps keys to values. Each token lets it decay, writes, and reads::

    S ← Diag(exp a) S        a ≤ 0: log decays, one for each channel of the key, one for all of them, or none
    u = v,  or  β (v − Sᵀk)  the value itself, or (delta rule) what the memory still gets wrong about it
    S ← S + k uᵀ
    o = Sᵀ q

In a chunk that S enters, unrolled, with b the cumulative sum of a, and A(x, y) = tril(Σ_d x_id y_jd exp(b_id − b_jd))::

    O = (Q ∘ exp b) S + A(Q, K) U        U = V, or the solution of (I + tril(β A(K, K), −1)) U = β (V − (K ∘ exp b) S)
    S ← Diag(exp b_C) S + (K ∘ exp(b_C − b))ᵀ U

A factorisation A = (Q ∘ exp b)(K ∘ exp −b)ᵀ overflows as soon as −b exceeds 88 in float32, and even the differences
b_i − b_j lose the digits of a small decay that follows large ones. So nothing here is divided by a decay, and no
cumulative sums are subtracted: every exponent is a sum of log decays, hence ≤ 0; −∞ (forget everything) is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbook.mechanisms.common import check_call, check_key_mask, widen, working_type
from attnbook.shapes import (
    AttentionShape,
    check_broadcastable,
    check_choice,
    check_count,
    check_no_nan,
    describe,
    mismatch,
    values_are_readable,
)

FORMS = ("parallel", "chunked", "recurrent")


def check_log_decay(log_decay: Any, target: tuple[int, ...], axes: str) -> Tensor:
    """Check logarithms of decays: a floating tensor that broadcasts to the target, nowhere above 0 (−∞ is allowed).

    Args:
        log_decay: what the caller passed.
        target: the shape to reach.
        axes: its axes for the message.
    Returns:
        The tensor, viewed with the target's rank.
    Raises:
        ValueError: another type, a shape that does not broadcast, NaN, a number above 0.
    """
    if not isinstance(log_decay, Tensor) or not log_decay.is_floating_point():
        raise mismatch("log_decay", "a floating tensor", describe(log_decay))
    log_decay = check_no_nan("log_decay", check_broadcastable("log_decay", log_decay, target, axes))
    if values_are_readable(log_decay) and (largest := log_decay.detach().max()) > 0:
        raise mismatch("log_decay", "numbers ≤ 0 (a decay exp(log_decay) is at most 1)", f"one of {largest:g}")
    return log_decay


def check_beta(beta: Any, target: tuple[int, ...]) -> Tensor:
    """Check the strengths of writing: a floating tensor that broadcasts to (B, H, L), finite.

    Args:
        beta: what the caller passed.
        target: (B, H, L).
    Returns:
        The tensor, viewed with three axes.
    Raises:
        ValueError: another type, a shape that does not broadcast, a number that is not finite.
    """
    if not isinstance(beta, Tensor) or not beta.is_floating_point():
        raise mismatch("beta", "a floating tensor", describe(beta))
    beta = check_broadcastable("beta", beta, target, "B H L")
    if values_are_readable(beta) and (count := int((~beta.detach().isfinite()).sum())):
        raise mismatch("beta", "finite numbers", f"{count} of {beta.numel()} that are not")
    return beta


def check_state(state: Any, shape: AttentionShape) -> Tensor | None:
    """Check the state that an earlier call returned.

    Args:
        state: what the caller passed; None is the empty state.
        shape: of the call.
    Returns:
        The state, or None.
    Raises:
        ValueError: no floating tensor (B, H, D, Dv), or NaN in it.
    """
    if state is None:
        return None
    wanted = (shape.B, shape.H, shape.D, shape.Dv)
    if not isinstance(state, Tensor) or not state.is_floating_point() or state.shape != wanted:
        raise mismatch("state", f"a floating tensor (B, H, D, Dv) = {wanted}", describe(state))
    return check_no_nan("state", state)


def _entering(log_decay: Tensor) -> Tensor:
    """(…, C, X): exp of the sum of a chunk's log decays up to each token, its own included."""
    return log_decay.cumsum(-2).exp()


def _leaving(log_decay: Tensor) -> Tensor:
    """(…, C, X): exp of the sum of a chunk's log decays after each token."""
    later = pad(log_decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(-2).flip(-2).exp()


def segment_decays(log_decay: Tensor) -> Tensor:
    """Return what is left at token i of what was written at token j: the 1-semiseparable mask of {cite}`dao2024b`.

    Each sum is a cumulative one that starts at j, not the difference of two.

    Args:
        log_decay: (…, C), ≤ 0.
    Returns:
        (…, C, C): exp of the sum of the log decays of the tokens j + 1 … i for j ≤ i, 0 above the diagonal.
    """
    size = log_decay.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
    return log_decay[..., None].masked_fill(~below, 0).cumsum(-2).exp().tril()


def _channel_scores(x: Tensor, y: Tensor, log_decay: Tensor) -> Tensor:
    """A(x, y) for a decay of each channel, by halving: every exponent is ≤ 0, and all work is matrix products.

    A pair j < i is scored where a block of 2s tokens splits between them: from j to the split decays y, from the split
    to i decays x. With s = 1, 2, 4, … each pair is met once, C(C − 1)/2 in all.
    """
    size = x.shape[-2]
    levels = (size - 1).bit_length()
    x, y, log_decay = (pad(z, (0, 0, 0, 2**levels - size)) for z in (x, y, log_decay))
    scores = (x * y).sum(-1)[..., None, None]  # (…, blocks, s, s): s = 1, the diagonal
    for s in (2**level for level in range(levels)):
        left, right = log_decay.unflatten(-2, (-1, 2, s)).unbind(-3)  # (…, blocks / 2, s, D)
        x_right = x.unflatten(-2, (-1, 2, s)).select(-3, 1) * _entering(right)
        y_left = y.unflatten(-2, (-1, 2, s)).select(-3, 0) * _leaving(left)
        above, below = scores.unflatten(-3, (-1, 2)).unbind(-3)  # (…, blocks / 2, s, s)
        across = torch.cat([x_right @ y_left.mT, below], -1)
        scores = torch.cat([pad(above, (0, s)), across], -2)
    return scores[..., 0, :size, :size]


def _pair_scores(x: Tensor, y: Tensor, log_decay: Tensor | None) -> Tensor:
    """A(x, y): (…, C, C), zero above the diagonal."""
    if log_decay is None:
        return (x @ y.mT).tril()
    if log_decay.shape[-1] == 1:
        return (x @ y.mT) * segment_decays(log_decay[..., 0])
    return _channel_scores(x, y, log_decay)


@dataclass(frozen=True)
class _Tokens:
    """The operands of a call in the working type, one head for each query head; q is scaled."""

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, H, L, D); 0 where masked
    v: Tensor  # (B, H, L, Dv); 0 where masked
    log_decay: Tensor | None  # (B, H, L, 1 or D); 0 where masked
    beta: Tensor | None  # (B, H, L, 1); 0 where masked

    def by_token(self):
        """Yield the operands of each token; None stays None."""
        parts = (self.q, self.k, self.v, self.log_decay, self.beta)
        return zip(*(repeat(None) if x is None else x.unbind(2) for x in parts), strict=False)

    def in_chunks(self, size: int) -> _Tokens:
        """(B, H, L, X) → (B, H, N, C, X); the last chunk is filled with tokens that change nothing."""
        more = -self.q.shape[2] % size
        parts = (self.q, self.k, self.v, self.log_decay, self.beta)
        return _Tokens(*(None if x is None else pad(x, (0, 0, 0, more)).unflatten(2, (-1, size)) for x in parts))


def _recurrent(tokens: _Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """Go through the tokens one by one."""
    outputs = []
    for q, k, v, a, beta in tokens.by_token():
        if a is not None:
            state = state * a.exp()[..., None]
        written = v if beta is None else beta * (v - (k[..., None, :] @ state)[..., 0, :])
        state = state + k[..., None] * written[..., None, :]
        outputs.append((q[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 2), state


def _chunked(tokens: _Tokens, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute all chunks at once but for the state, which goes from chunk to chunk."""
    length = tokens.q.shape[2]
    chunks = tokens.in_chunks(size)
    q, k, a, beta = chunks.q, chunks.k, chunks.log_decay, chunks.beta
    entering, leaving = (1, 1) if a is None else (_entering(a), _leaving(a))
    total = repeat(1) if a is None else a.sum(-2).exp()[..., None].unbind(2)  # (B, H, 1 or D, 1) a chunk
    if beta is None:
        scores, values, read = _pair_scores(q, k, a), chunks.v, None
    else:  # the WY representation: (I + tril(β A(K, K), −1))⁻¹ is applied to β V and β (K ∘ exp b), all chunks at once
        scores, system = _pair_scores(torch.stack([q, beta * k]), k, a)
        solved = torch.linalg.solve_triangular(
            system, torch.cat([beta * chunks.v, beta * k * entering], -1), upper=False, unitriangular=True
        )
        values, read = solved.split([chunks.v.shape[-1], k.shape[-1]], -1)
    keys = (k * leaving).unbind(2)
    entered, written = [], []
    for i, (kept, value) in enumerate(zip(total, values.unbind(2), strict=False)):
        entered.append(state)
        written.append(value if read is None else value - read[:, :, i] @ state)
        state = kept * state + keys[i].mT @ written[i]
    output = (q * entering) @ torch.stack(entered, 2) + scores @ torch.stack(written, 2)
    return output.flatten(2, 3)[:, :, :length], state


def attend_by_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Any = None,
    decay_axes: str | None = None,
    beta: Any = None,
    delta: bool = False,
    scale: float,
    attn_mask: Tensor | None,
    form: str,
    chunk_size: int,
    state: Tensor | None,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check a call and run the recurrence of this module in the form asked for.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        log_decay: broadcastable to (B, H, L), or to (B, H, L, D), as ``decay_axes`` says.
        decay_axes: "B H L", "B H L D", or None for a state that does not decay.
        beta: broadcastable to (B, H, L), used with ``delta``.
        delta: write corrections (the delta rule), not the values.
        scale: factor of the queries.
        attn_mask: broadcastable to (B, H, 1, L), bool; a position that is False neither writes nor decays the state.
        form: "parallel" (one chunk), "chunked" or "recurrent".
        chunk_size: tokens of a chunk.
        state: (B, H, D, Dv), what an earlier call returned; empty by default.
        return_state: return the state after the last token too.
    Returns:
        (B, H, L, Dv), dtype of query; with return_state also (B, H, D, Dv) in float32, or float64.
    Raises:
        ValueError: arguments that do not fit.
    """
    shape = check_call(query, key, value, equal_lengths=True)
    mask = check_key_mask(attn_mask, shape)
    check_choice("form", form, FORMS)
    check_count("chunk_size", chunk_size)
    state = check_state(state, shape)
    target = (shape.B, shape.H, shape.L)
    if decay_axes == "B H L D":
        log_decay = check_log_decay(log_decay, (*target, shape.D), decay_axes).expand(*target, shape.D)
    elif decay_axes == "B H L":
        log_decay = check_log_decay(log_decay, target, decay_axes).expand(target)[..., None]
    if delta:
        beta = check_beta(beta, target).expand(target)[..., None]
    work = working_type(query)

    def at_keys(x: Tensor | None) -> Tensor | None:
        """Bring what each position writes with into the working type, and blank it where it is masked."""
        if x is None or mask is None:
            return x if x is None else x.to(work)
        return x.to(work).masked_fill(~mask.mT, 0)  # the mask as (…, L, 1)

    keys_and_values = (at_keys(widen(x, shape)) for x in (key, value))
    tokens = _Tokens(query.to(work) * float(scale), *keys_and_values, at_keys(log_decay), at_keys(beta))
    if state is None:
        state = query.new_zeros(shape.B, shape.H, shape.D, shape.Dv, dtype=work)
    if form == "recurrent":
        output, state = _recurrent(tokens, state.to(work))
    else:
        size = shape.L if form == "parallel" else min(chunk_size, shape.L)
        output, state = _chunked(tokens, state.to(work), size)
    output = output.to(query.dtype)
    return (output, state) if return_state else output
