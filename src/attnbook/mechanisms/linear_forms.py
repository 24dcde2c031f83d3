"""Sums over keys of φ(q)·φ(k) v in three forms, equal to one another: parallel, chunked, recurrent.

    output i = Σⱼ φ(qᵢ)·φ(kⱼ) vⱼ / Σⱼ φ(qᵢ)·φ(kⱼ)

Values are carried with a column of ones behind them, so that one product yields numerator and denominator. What the
keys up to some position leave behind is the *state* Σⱼ φ(kⱼ) [vⱼ 1]ᵀ, of a size that does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.shapes import check_choice, check_count, mismatch

FORMS = ("parallel", "chunked", "recurrent")
TOGETHER = 4  # chunks of a sequence worked on at once; more hold more memory
MOST_TOGETHER = 32  # of all sequences; more leave the cache


class FeatureMap(NamedTuple):
    """An elementwise φ whose slope can be told from its value, so that only its argument need be kept.

    Attributes:
        value: x → φ(x).
        slope: φ(x) → φ′(x).
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _elu1(x: Tensor) -> Tensor:
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))  # elu(x) + 1, but without its cancellation for x far below 0


FEATURE_MAPS = {
    "elu1": FeatureMap(_elu1, lambda y: y.clamp(max=1)),  # up to y = 1 the slope is exp(x) = y itself
    "relu": FeatureMap(torch.relu, torch.sign),
    "exp": FeatureMap(torch.exp, lambda y: y),
}


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, feature_map: FeatureMap) -> Tensor:
        y = feature_map.value(x)
        ctx.save_for_backward(y)
        ctx.feature_map = feature_map
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.feature_map.slope(*ctx.saved_tensors), None


def mapped(x: Tensor, feature_map: FeatureMap | None) -> Tensor:
    """Apply a feature map, or none.

    Args:
        x: any.
        feature_map: φ, or None.
    """
    return x if feature_map is None else _Mapped.apply(x, feature_map)


# In what follows   q  (N, L, F)   features of queries, N = B·H      k  (N, S, F)   features of keys
#   v  (N, S, E)    values, with the ones behind them: E = Dv + 1; without them, where nothing is divided: E = Dv
#   state  (N, F, E)


def check_form(form: str, is_causal: bool, chunk_size: int, state: Tensor | None, return_state: bool) -> None:
    """Check the arguments that choose a form.

    Args:
        form: one of "parallel", "chunked", "recurrent".
        is_causal: whether queries see earlier keys only.
        chunk_size: positions of a chunk.
        state: what earlier keys left, or None.
        return_state: whether the state is wanted.
    Raises:
        ValueError: an unknown form, a size below 1, a state for the parallel form, which has none.
    """
    check_choice("form", form, FORMS)
    check_count("chunk_size", chunk_size)
    if form == "parallel" and (return_state or state is not None):
        raise mismatch("form", "'chunked' or 'recurrent' where a state is carried", "'parallel'")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    is_causal: bool = False,
    form: str = "chunked",
    chunk_size: int = 64,
    state: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Weigh values by the products of features, and divide by the sum of the weights.

    Args:
        query: φ(q), (B, H, L, F), or q where the feature map is given; float32 or float64, as everything here.
        key: φ(k), (B, H, S, F), zero where a key is masked; or k.
        value: (B, H, S, Dv).
        feature_map: φ, to be applied to queries and keys here, chunk by chunk in the causal chunked form.
        is_causal: let query i see keys up to i + S − L.
        form: "parallel", "chunked" or "recurrent".
        chunk_size: positions of a chunk.
        state: (B, H, F, Dv + 1), what earlier keys left; all queries see it.
        normalize: divide; where the weights sum to 0, the output is 0. If not, the states have no column of ones.
    Returns:
        (B, H, L, Dv), and the state after all keys, or None from the parallel form.
    """
    B, H, L, F = query.shape
    S, width = value.shape[2], value.shape[3] + normalize
    q, k, v = query.reshape(B * H, L, F), key.reshape(B * H, S, F), value.reshape(B * H, S, -1)
    if not is_causal or form != "chunked":
        q, k, feature_map = mapped(q, feature_map), mapped(k, feature_map), None
    if form == "parallel":
        return _parallel(q, k, v, is_causal, normalize).view(B, H, L, -1), None
    past = q.new_zeros(B * H, F, width) if state is None else state.reshape(B * H, F, width)
    early = max(S - L, 0) if is_causal else S  # that many keys are seen by every query
    if early:
        past = past + _summed(mapped(k[:, :early], feature_map), v[:, :early], normalize, form)
    if not is_causal:
        return _read(q, past, normalize).view(B, H, L, -1), past.view(B, H, F, width)
    blind = max(L - S, 0)  # that many queries see no key, only what was there before
    parts = [_read(mapped(q[:, :blind], feature_map), past, normalize)] if blind else []
    rest = q[:, blind:], k[:, early:], v[:, early:], past  # here L = S
    if form == "chunked":
        output, past = _Chunked.apply(*rest, feature_map, chunk_size, normalize)
    else:
        output, past = _recurrent(*rest, normalize)
    output = torch.cat([*parts, output], 1) if parts else output
    return output.view(B, H, L, -1), past.view(B, H, F, width)


def _with_ones(v: Tensor, normalize: bool) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v


def _divisor(total: Tensor) -> Tensor:
    """The total, and ∞ where it is 0: whatever is divided by it gives 0 then, and so do the gradients.

    Not its inverse, which overflows where the total is very small.
    """
    return total.masked_fill(total == 0, torch.inf)


def _read(q: Tensor, state: Tensor, normalize: bool) -> Tensor:
    """What queries make of a state: (N, L, Dv)."""
    sums = q @ state
    return sums[..., :-1] / _divisor(sums[..., -1:]) if normalize else sums


def _parallel(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, normalize: bool) -> Tensor:
    weights = q @ k.mT  # (N, L, S), as one would define it
    if is_causal:
        weights = weights.tril(k.shape[1] - q.shape[1])
    output = weights @ v
    return output / _divisor(weights.sum(-1, keepdim=True)) if normalize else output


def _summed(k: Tensor, v: Tensor, normalize: bool, form: str) -> Tensor:
    """What keys leave behind: (N, F, E)."""
    if form == "chunked":
        state = k.mT @ v
        return torch.cat([state, k.sum(1)[..., None]], -1) if normalize else state
    v = _with_ones(v, normalize)
    state = k.new_zeros(k.shape[0], k.shape[2], v.shape[2])
    for t in range(k.shape[1]):
        state = state + k[:, t, :, None] * v[:, t, None, :]
    return state


def _recurrent(q: Tensor, k: Tensor, v: Tensor, state: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    v, outputs = _with_ones(v, normalize), []
    for t in range(k.shape[1]):
        state = state + k[:, t, :, None] * v[:, t, None, :]
        outputs.append(_read(q[:, t : t + 1], state, normalize))
    return torch.cat(outputs, 1), state


class _Chunked(torch.autograd.Function):
    """The causal form with L = S: inside a chunk all pairs, from chunk to chunk the state.

    A few chunks are worked on at once, N · n of them: enough to keep several threads busy, few enough to stay in the
    processor's cache through all that is done with them, the feature map too. Only the states go from one to the next.
    """

    @staticmethod
    def forward(ctx, q, k, v, state, feature_map, size, normalize):
        N, L, _ = q.shape
        width, out = v.shape[2], v.new_empty(v.shape)
        divisor = q.new_empty(N, L, 1) if normalize else None
        state, keep, kept = state.clone(), any(ctx.needs_input_grad), []
        for rows, n in _runs(N, L, size):
            qc, kc, vc = _chunks(q, k, v, rows, n, feature_map, normalize)
            steps = torch.bmm(kc.mT, vc).view(N, n, *state.shape[1:])
            before = torch.empty_like(steps)  # the state before each chunk
            for j in range(n):
                before[:, j] = state
                state += steps[:, j]
            before = before.flatten(0, 1)
            sums = torch.bmm(torch.bmm(qc, kc.mT).tril_(), vc).baddbmm_(qc, before).view(N, -1, state.shape[2])
            if normalize:
                divisor[:, rows] = _divisor(sums[..., width:])
                torch.div(sums[..., :width], divisor[:, rows], out=out[:, rows])
            else:
                out[:, rows] = sums
            if keep:
                kept.append(before)
        ctx.save_for_backward(q, k, v, out if normalize else None, divisor, *kept)
        ctx.feature_map, ctx.size, ctx.normalize = feature_map, size, normalize
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_state):
        # With W = tril(Q Kᵀ) in a chunk, T the state before it, G the gradient of the sums W V + Q T, and R that of the
        # state after it:   dW = tril(G Vᵀ)   dQ = dW K + G Tᵀ   dK = dWᵀ Q + V Rᵀ   dV = Wᵀ G + K R
        # and the gradient of the state before it is R + Qᵀ G.
        q, k, v, out, divisor, *kept = ctx.saved_tensors
        N, L, _ = q.shape
        width, feature_map = v.shape[2], ctx.feature_map
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        R = grad_state.clone()
        for (rows, n), before in zip(reversed(list(_runs(N, L, ctx.size))), reversed(kept), strict=True):
            qc, kc, vc = _chunks(q, k, v, rows, n, feature_map, ctx.normalize)
            G = grad[:, rows]
            if ctx.normalize:  # output = numerator / divisor, and a larger divisor shrinks it
                back = G / divisor[:, rows]
                G = torch.cat([back, -(back * out[:, rows]).sum(-1, keepdim=True)], -1)
            G = _cut(G, n)
            steps = torch.bmm(qc.mT, G).view(N, n, *R.shape[1:])
            after = torch.empty_like(steps)  # the gradient of the state after each chunk
            for j in reversed(range(n)):
                after[:, j] = R
                R += steps[:, j]
            after = after.flatten(0, 1)
            W = torch.bmm(qc, kc.mT).tril_()
            dW = torch.bmm(G, vc.mT).tril_()
            _through(torch.bmm(dW, kc).baddbmm_(G, before.mT), qc, feature_map, dq[:, rows])
            _through(torch.bmm(dW.mT, qc).baddbmm_(vc, after.mT), kc, feature_map, dk[:, rows])
            dv[:, rows] = torch.bmm(W.mT, G[..., :width]).baddbmm_(kc, after[..., :width]).view(N, -1, width)
        return dq, dk, dv, R, None, None, None


def _runs(N: int, L: int, size: int) -> Iterator[tuple[slice, int]]:
    """Yield rows, and how many chunks of one size they are; what does not fill a chunk comes last, alone."""
    whole, most = L // size, max(1, min(TOGETHER, MOST_TOGETHER // N))
    for first in range(0, whole, most):
        n = min(most, whole - first)
        yield slice(first * size, (first + n) * size), n
    if L % size:
        yield slice(whole * size, L), 1


def _cut(x: Tensor, n: int) -> Tensor:
    """(N, n·C, X) → (N·n, C, X)."""
    return x.reshape(x.shape[0] * n, -1, x.shape[2])


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, n: int, feature_map: FeatureMap | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return n chunks of each, (N·n, C, …): features of queries and keys, values with the ones behind them."""
    q, k, v = q[:, rows], k[:, rows], _with_ones(v[:, rows], normalize)
    if feature_map is not None:
        q, k = feature_map.value(q), feature_map.value(k)
    return _cut(q, n), _cut(k, n), _cut(v, n)


def _through(grad: Tensor, y: Tensor, feature_map: FeatureMap | None, out: Tensor) -> None:
    """Turn the gradient of chunks y = φ(x) into that of x, (N, n·C, F)."""
    grad = grad.view(out.shape)
    if feature_map is None:
        out.copy_(grad)
    else:
        torch.mul(grad, feature_map.slope(y).view(out.shape), out=out)
