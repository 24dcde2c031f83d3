"""Galerkin and Fourier attention: no softmax, layer normalisation instead, and a mean over the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, widen, working_type
from attnbook.mechanisms.linear import hide
from attnbook.mechanisms.linear_forms import attend, check_form
from attnbook.shapes import AttentionShape, check_no_nan, check_tensor, mismatch, tensor_shape


def _normalised(x: Tensor, scale: Tensor | None, shift: Tensor | None, names: tuple[str, str], eps: float) -> Tensor:
    """Layer normalisation of each head's vectors, with a scale and a shift of its own if they are given."""
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    heads, width = x.shape[1], x.shape[-1]
    for name, given in zip(names, (scale, shift), strict=True):
        if given is None:
            continue
        check_tensor(name, given, "... D")
        if given.shape not in ((width,), (1, width), (heads, width)):
            raise mismatch(name, f"({width},) or ({heads}, {width})", tensor_shape(given))
        given = check_no_nan(name, given).to(x.dtype)[..., None, :]  # the same at all positions
        x = x * given if name.endswith("scale") else x + given
    return x


def _mean_over_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    shape: AttentionShape,
    is_causal: bool,
    form: str,
    chunk_size: int,
) -> Tensor:
    """(1 / n) Σⱼ (q·kⱼ) vⱼ over the n keys that a query may see; 0 where there are none."""
    sums, _ = attend(q, hide(k, mask), v, is_causal=is_causal, form=form, chunk_size=chunk_size, normalize=False)
    seen = q.new_ones(1, 1, 1, shape.S) if mask is None else mask.expand(-1, -1, 1, shape.S).to(q.dtype)
    if is_causal:
        last = torch.arange(shape.L, device=q.device) + (shape.S - shape.L)  # the last key that each query sees
        counts = torch.where(last >= 0, seen.cumsum(-1)[..., last.clamp(min=0)], 0.0).mT
    else:
        counts = seen.sum(-1, keepdim=True)
    return sums / counts.clamp(min=1)


def galerkin_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_scale: Tensor | None = None,
    key_shift: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_shift: Tensor | None = None,
    eps: float = 1e-5,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    form: str = "chunked",
    chunk_size: int = 64,
) -> Tensor:
    """Project values onto the span of the keys: Q (K̃ᵀ Ṽ) / n, with layer-normalised keys and values.

    {cite}`cao2021`, "Galerkin-type attention": K̃ᵀ Ṽ / n is a quadrature of inner products, and Q holds the basis in
    which the result is expanded. Differs from the paper: coordinates are not appended to the vectors (append them to
    query, key and value beforehand); masked keys are not counted in n; and there is a causal form, in which each query
    averages over the n keys that it may see.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        key_scale: factors after the normalisation of keys, (D,) or (Hkv, D); 1 by default.
        key_shift: what is added then, likewise; 0 by default.
        value_scale: the same for values, (Dv,) or (Hkv, Dv).
        value_shift: likewise.
        eps: added to the variances.
        attn_mask: of keys, broadcastable to (B, H, 1, S), bool; True = may be attended to.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        form: "chunked", "parallel" or "recurrent", as in ``linear_attention``.
        chunk_size: positions of a chunk.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes, types or sizes that do not fit; NaN in query, key, a scale or a shift.
    Cost: O((L + S)·D·Dv) time, and O(D·Dv) memory beyond the normalised vectors; causal as ``linear_attention``.
    """
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    check_form(form, is_causal, chunk_size, None, False)
    dtype = working_type(query)
    k = _normalised(key.to(dtype), key_scale, key_shift, ("key_scale", "key_shift"), eps)
    v = _normalised(value.to(dtype), value_scale, value_shift, ("value_scale", "value_shift"), eps)
    k, v = widen(k, shape), widen(v, shape)
    return _mean_over_keys(query.to(dtype), k, v, mask, shape, is_causal, form, chunk_size).to(query.dtype)


def fourier_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_scale: Tensor | None = None,
    query_shift: Tensor | None = None,
    key_scale: Tensor | None = None,
    key_shift: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    form: str = "chunked",
    chunk_size: int = 64,
) -> Tensor:
    """Apply a learned integral operator: (Q̃ K̃ᵀ) V / n, with layer-normalised queries and keys.

    {cite}`cao2021`, "Fourier-type attention". Differs from the paper: it multiplies Q̃ K̃ᵀ first, at O(n²D), but as
    nothing is normalised over the pairs the product may be taken in the other order, and the default form does so;
    coordinates, masks and the causal form are as in :func:`galerkin_attention`. The authors' code divides by √D as
    well: ``scale=D**-0.5``.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        query_scale: factors after the normalisation of queries, (D,) or (H, D); 1 by default.
        query_shift: what is added then, likewise; 0 by default.
        key_scale: the same for keys, (D,) or (Hkv, D).
        key_shift: likewise.
        scale: factor of the products of queries and keys.
        eps: added to the variances.
        attn_mask: of keys, broadcastable to (B, H, 1, S), bool; True = may be attended to.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        form: "chunked", "parallel" (the paper's order) or "recurrent", as in ``linear_attention``.
        chunk_size: positions of a chunk.
    Returns:
        (B, H, L, Dv), dtype of query.
    Raises:
        ValueError: shapes, types or sizes that do not fit; NaN in query, key, a scale or a shift.
    Cost: O((L + S)·D·Dv) time, and O(D·Dv) memory beyond the normalised vectors; causal as ``linear_attention``.
    """
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    check_form(form, is_causal, chunk_size, None, False)
    dtype = working_type(query)
    q = _normalised(query.to(dtype), query_scale, query_shift, ("query_scale", "query_shift"), eps) * scale
    k = _normalised(key.to(dtype), key_scale, key_shift, ("key_scale", "key_shift"), eps)
    k, v = widen(k, shape), widen(value, shape)
    return _mean_over_keys(q, k, v, mask, shape, is_causal, form, chunk_size).to(query.dtype)
