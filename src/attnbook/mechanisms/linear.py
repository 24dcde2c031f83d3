"""Linear attention: a product of feature maps in place of the exponential, so that sums over keys can be shared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbook.mechanisms.common import check_call, check_key_mask, widen, working_type
from attnbook.mechanisms.linear_forms import FEATURE_MAPS, attend, check_form, mapped
from attnbook.shapes import (
    AttentionShape,
    check_choice,
    check_no_nan,
    check_tensor,
    describe,
    describe_dtype,
    mismatch,
    tensor_shape,
)


def features(name: str, feature_map: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Map queries or keys to features by a caller's function, and look at what it returned.

    Args:
        name: "query" or "key", for the message.
        feature_map: (B, H, n, D) → (B, H, n, F).
        x: (B, H, n, D).
    Returns:
        (B, H, n, F).
    Raises:
        ValueError: something of another shape or type.
    """
    y = feature_map(x)
    if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[:-1] != x.shape[:-1] or y.dtype != x.dtype:
        shown = ", ".join(map(str, x.shape[:-1]))
        expected = f"a function that makes a {describe_dtype(x)} tensor ({shown}, F) of {name}"
        raise mismatch("feature_map", expected, describe(y))
    return y


def hide(key_features: Tensor, mask: Tensor | None) -> Tensor:
    """Set the features of masked keys to zero: they then add nothing to any sum.

    Args:
        key_features: (B, H, S, F).
        mask: (B or 1, H or 1, 1, S or 1), bool, or None.
    """
    return key_features if mask is None else key_features.masked_fill(~mask.mT, 0.0)


def check_state(state: Tensor | None, shape: AttentionShape, num_features: int, dtype: torch.dtype) -> None:
    """Check what earlier keys left behind.

    Args:
        state: (B, H, F, Dv + 1), or None.
        shape: of the call.
        num_features: F.
        dtype: the working type.
    Raises:
        ValueError: another shape or type.
    """
    if state is None:
        return
    check_tensor("state", state, "B H F Dv+1", dtypes=(dtype,))
    wanted = (shape.B, shape.H, num_features, shape.Dv + 1)
    if state.shape != wanted:
        raise mismatch("state", f"(B, H, F, Dv + 1) = {wanted}", tensor_shape(state))
    check_no_nan("state", state)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu1",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    form: str = "chunked",
    chunk_size: int = 64,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weigh values by φ(q)·φ(k), which needs no matrix of pairs.

    Computes Σⱼ φ(qᵢ)·φ(kⱼ) vⱼ / Σⱼ φ(qᵢ)·φ(kⱼ)  {cite}`katharopoulos2020`, §3.2; causal, §3.3. The recurrent form
    walks from position to position (their §3.4); the parallel one builds all pairs, as a definition; the
    chunked one builds the pairs inside a chunk and carries a state from chunk to chunk. They agree but for rounding.
    Differs from the paper: its causal form updates the state at every position, its backward pass walks likewise; and
    where all weights of a row are zero the output is 0. No scale: φ sees queries and keys as they are.

    Args:
        query: (B, H, L, D) float.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        feature_map: φ, by name: "elu1" (elu(x) + 1), "relu", "exp"; or a function (B, H, n, D) → (B, H, n, F). Features
            should not be negative, else the sum of weights may come near zero.
        attn_mask: of keys, broadcastable to (B, H, 1, S), bool; True = may be attended to.
        is_causal: let each query see its own position and earlier ones; where L ≠ S the ends are aligned.
        form: "chunked", "parallel" or "recurrent".
        chunk_size: positions of a chunk.
        state: what earlier calls on the same sequence returned; its keys are seen by all queries. Not for "parallel".
        return_state: return the state after all keys, too.
    Returns:
        (B, H, L, Dv), dtype of query; with return_state also (B, H, F, Dv + 1), float32 or float64, the sums of
        φ(k) vᵀ and, in the last column, of φ(k). The chunked causal form is differentiable once.
    Raises:
        ValueError: shapes, types, a form, a size or a state that do not fit; NaN in query or key.
    Cost: O((L + S)·F·(C + Dv)) time and O((L + S)(F + Dv) + F·Dv·S/C) memory with chunks of C; O(1) a step of decoding.
        The parallel form is O(LS) in both; the recurrent one keeps a state for each position when it is differentiated.
    """
    shape = check_call(query, key, value)
    mask = check_key_mask(attn_mask, shape)
    check_form(form, is_causal, chunk_size, state, return_state)
    q, k, v = query.to(working_type(query)), widen(key, shape), widen(value, shape)
    named = None
    if callable(feature_map):
        q, k = features("query", feature_map, q), features("key", feature_map, k)
        if q.shape[-1] != k.shape[-1]:
            raise mismatch("feature_map", f"as many features of keys as of queries, {q.shape[-1]}", str(k.shape[-1]))
    else:
        named = FEATURE_MAPS[check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))]
    if mask is not None:  # features of masked keys are 0, whatever φ(0) is
        q, k, named = mapped(q, named), hide(mapped(k, named), mask), None
    check_state(state, shape, q.shape[-1], q.dtype)
    options = {"is_causal": is_causal, "form": form, "chunk_size": chunk_size}
    output, state = attend(q, k, v, feature_map=named, state=state, **options)
    output = output.to(query.dtype)
    return (output, state) if return_state else output
