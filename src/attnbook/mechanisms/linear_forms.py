"""Sums over keys of φ(q)·φ(k) v in three forms, equal to one another: parallel, chunked, recurrent.

    output i = Σⱼ φ(qᵢ)·φ(kⱼ) vⱼ / Σⱼ φ(qᵢ)·φ(kⱼ)

Values are carried with a column of ones behind them, so that one product yields numerator and denominator. What the
keys up to some position leave behind is the *state* Σⱼ φ(kⱼ) [vⱼ 1]ᵀ, of a size that does not depend on their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbook.shapes import check_choice, check_count, mismatch

FORMS = ("parallel", "chunked", "recurrent")

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
    is_causal: bool = False,
    form: str = "chunked",
    chunk_size: int = 64,
    state: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Weigh values by the products of features, and divide by the sum of the weights.

    Args:
        query: φ(q), (B, H, L, F); float32 or float64, as everything here.
        key: φ(k), (B, H, S, F); zero where a key is masked.
        value: (B, H, S, Dv).
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
    if form == "parallel":
        return _parallel(q, k, v, is_causal, normalize).view(B, H, L, -1), None
    past = q.new_zeros(B * H, F, width) if state is None else state.reshape(B * H, F, width)
    early = max(S - L, 0) if is_causal else S  # that many keys are seen by every query
    if early:
        past = past + _summed(k[:, :early], v[:, :early], normalize, form)
    if not is_causal:
        return _read(q, past, normalize).view(B, H, L, -1), past.view(B, H, F, width)
    blind = max(L - S, 0)  # that many queries see no key, only what was there before
    parts = [_read(q[:, :blind], past, normalize)] if blind else []
    if form == "chunked":
        output, past = _Chunked.apply(q[:, blind:], k[:, early:], v[:, early:], past, chunk_size, normalize)
    else:
        output, past = _recurrent(q[:, blind:], k[:, early:], v[:, early:], past, normalize)
    output = torch.cat([*parts, output], 1) if parts else output
    return output.view(B, H, L, -1), past.view(B, H, F, width)


def _with_ones(v: Tensor, normalize: bool) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v


def _inverse(total: Tensor) -> Tensor:
    """1 / total, and 0 where nothing was summed."""
    return torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))


def _read(q: Tensor, state: Tensor, normalize: bool) -> Tensor:
    """What queries make of a state: (N, L, Dv)."""
    sums = q @ state
    return sums[..., :-1] * _inverse(sums[..., -1:]) if normalize else sums


def _parallel(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, normalize: bool) -> Tensor:
    weights = q @ k.mT  # (N, L, S), as one would define it
    if is_causal:
        weights = weights.tril(k.shape[1] - q.shape[1])
    output = weights @ v
    return output * _inverse(weights.sum(-1, keepdim=True)) if normalize else output


def _summed(k: Tensor, v: Tensor, normalize: bool, form: str) -> Tensor:
    """What keys leave behind: (N, F, E)."""
    if form == "chunked":
        state = k.mT @ v
        return torch.cat([state, k.sum(1)[..., None]], -1) if normalize else state
    v = _with_ones(v, normalize)
    state = torch.zeros_like(k[:, 0, :, None] * v[:, 0, None, :])
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
    """The causal form with L = S: inside a chunk all pairs, from chunk to chunk the state."""

    @staticmethod
    def forward(ctx, q, k, v, state, size, normalize):
        N, L, _ = q.shape
        width, out = v.shape[2], v.new_empty(v.shape)
        inverse = q.new_empty(N, L, 1) if normalize else None
        chunks = range(0, L, size)
        keep = any(ctx.needs_input_grad)
        states = q.new_empty(len(chunks) if keep else 0, *state.shape)  # the state before each chunk
        state, ones = state.clone(), q.new_ones(N, min(size, L), state.shape[2])
        for number, start in enumerate(chunks):
            rows = slice(start, start + size)
            qc, kc, vc = q[:, rows], k[:, rows], _filled(ones, v[:, rows])
            if keep:
                states[number] = state
            sums = torch.bmm(torch.bmm(qc, kc.mT).tril_(), vc).baddbmm_(qc, state)
            state.baddbmm_(kc.mT, vc)
            if normalize:
                inverse[:, rows] = _inverse(sums[..., width:])
                torch.mul(sums[..., :width], inverse[:, rows], out=out[:, rows])
            else:
                out[:, rows] = sums
        ctx.save_for_backward(q, k, v, states, out if normalize else None, inverse)
        ctx.size, ctx.normalize = size, normalize
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_state):
        # With W = tril(Q Kᵀ) in a chunk, T the state before it, G the gradient of the sums W V + Q T, and R that of the
        # state after it:   dW = tril(G Vᵀ)   dQ = dW K + G Tᵀ   dK = dWᵀ Q + V Rᵀ   dV = Wᵀ G + K R
        # and the gradient of the state before it is R + Qᵀ G.
        q, k, v, states, out, inverse = ctx.saved_tensors
        N, L, _ = q.shape
        width, size = v.shape[2], ctx.size
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        R = grad_state.clone()
        ones, sums = (q.new_ones(N, min(size, L), R.shape[2]) for _ in range(2))
        for number in reversed(range(len(states))):
            rows = slice(number * size, (number + 1) * size)
            qc, kc, vc = q[:, rows], k[:, rows], _filled(ones, v[:, rows])
            G = grad[:, rows]
            if ctx.normalize:  # output = numerator · inverse, and a larger denominator shrinks it
                back = G * inverse[:, rows]
                G = _filled(sums, back)
                G[..., width] = -(back * out[:, rows]).sum(-1)
            W = torch.bmm(qc, kc.mT).tril_()
            dW = torch.bmm(G, vc.mT).tril_()
            dq[:, rows] = torch.bmm(dW, kc).baddbmm_(G, states[number].mT)
            dk[:, rows] = torch.bmm(dW.mT, qc).baddbmm_(vc, R.mT)
            dv[:, rows] = torch.bmm(W.mT, G[..., :width]).baddbmm_(kc, R[..., :width])
            R.baddbmm_(qc.mT, G)
        return dq, dk, dv, R, None, None


def _filled(ones: Tensor, v: Tensor) -> Tensor:
    """[v 1] in the storage of ``ones``, (N, C, E)."""
    part = ones[:, : v.shape[1]]
    part[..., : v.shape[2]] = v
    return part
