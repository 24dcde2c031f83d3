"""Axis names, argument checks, and the one style in which this library complains.

Axes, used with these letters in every docstring and in the book's notation table:

======  =============================================================
letter  axis
======  =============================================================
B       batch
H       query heads
Hkv     key–value heads; H is a multiple of Hkv
L       queries (target positions)
S       keys and values (source positions)
D       size of one query or key head
Dv      size of one value head
E       width of a model
======  =============================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(value: Any) -> str:
    """Say briefly what a value is: dtype and shape of a tensor, type and value of anything else.

    Args:
        value: anything.
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str, tuple)):
        return repr(value)
    return type(value).__name__


def mismatch(argument: str, expected: str, actual: Any) -> ValueError:
    """Build the error for a bad argument: its name, what was expected and what came.

    Args:
        argument: the parameter's name as the caller wrote it.
        expected: what would have been accepted.
        actual: what came; a string is taken as it is, anything else is described.
    Returns:
        The ``ValueError``, to be raised by the caller.
    """
    came = actual if isinstance(actual, str) else describe(actual)
    return ValueError(f"{argument}: expected {expected}, got {came}")


def check_tensor(argument: str, tensor: Any, axes: str, *, dtypes: Sequence[torch.dtype] | None = FLOATS) -> Tensor:
    """Check that an argument is a non-empty tensor with the named axes.

    Args:
        argument: the parameter's name.
        tensor: what the caller passed.
        axes: the axes' names separated by spaces, "B H L D" say; a leading "..." admits any axes before the rest.
        dtypes: the element types admitted, or None for any.
    Returns:
        The tensor, unchanged.
    Raises:
        ValueError: it is no tensor, has another rank, an empty axis or another element type.
    """
    names = axes.split()
    shown = f"({', '.join(names)})"
    if not isinstance(tensor, Tensor):
        raise mismatch(argument, f"a tensor {shown}", describe(tensor))
    fixed = [name for name in names if name != "..."]
    if tensor.dim() < len(fixed) or (len(fixed) == len(names) and tensor.dim() != len(names)):
        raise mismatch(argument, f"a tensor {shown}", describe(tensor))
    if 0 in tensor.shape:
        raise mismatch(argument, f"a tensor {shown} with no empty axis", tensor)
    if dtypes is not None and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise mismatch(argument, f"a {wanted} tensor", tensor)
    return tensor


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> str:
    """Check that an argument is one of a few names.

    Args:
        argument: the parameter's name.
        value: what the caller passed.
        choices: the names admitted.
    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise mismatch(argument, "one of " + ", ".join(map(repr, choices)), describe(value))
    return value


def check_count(argument: str, value: Any, *, least: int = 1) -> int:
    """Check that an argument is an integer no smaller than ``least``.

    Args:
        argument: the parameter's name.
        value: what the caller passed.
        least: the smallest admitted.
    Raises:
        ValueError: it is no integer, or a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise mismatch(argument, f"an integer ≥ {least}", describe(value))
    return value


def check_probability(argument: str, value: Any) -> float:
    """Check that an argument lies in [0, 1).

    Args:
        argument: the parameter's name.
        value: what the caller passed.
    Raises:
        ValueError: it does not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise mismatch(argument, "a number in [0, 1)", describe(value))
    return float(value)


def check_positive(argument: str, value: float) -> float:
    """Check that an argument is a finite number above zero.

    Args:
        argument: the parameter's name.
        value: what the caller passed.
    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise mismatch(argument, "a finite number > 0", describe(value))
    return float(value)


class AttentionShape(NamedTuple):
    """The sizes of one attention call; field names are the axes' letters."""

    B: int
    H: int
    Hkv: int
    L: int
    S: int
    D: int
    Dv: int


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> AttentionShape:
    """Check that queries, keys and values fit together.

    Args:
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
    Returns:
        Their sizes.
    Raises:
        ValueError: a wrong rank, an empty axis, an element type other than float64/32/16 or bfloat16, types or devices
            that differ, sizes that do not match, or H not a multiple of Hkv.
    """
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    if not tensors or not query.dim() == key.dim() == value.dim() == 4:
        _explain(query, key, value)
    B, H, L, D = query.shape
    batch, Hkv, S, Dv = value.shape
    if (
        key.shape != (B, Hkv, S, D)
        or batch != B
        or not B * H * Hkv * L * S * D * Dv
        or H % Hkv
        or not query.dtype == key.dtype == value.dtype
        or query.dtype not in FLOATS
        or not query.device == key.device == value.device
    ):  # asked once for all, since it is asked at every call; what is wrong takes longer to say
        _explain(query, key, value)
    return AttentionShape(B, H, Hkv, L, S, D, Dv)


def _explain(query: Any, key: Any, value: Any) -> None:
    """Raise the error of arguments that do not fit together."""
    check_tensor("query", query, "B H L D")
    check_tensor("key", key, "B Hkv S D")
    check_tensor("value", value, "B Hkv S Dv")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise mismatch(name, f"{describe_dtype(query)}, the type of query", describe_dtype(tensor))
        if tensor.device != query.device:
            raise mismatch(name, f"device {query.device}, that of query", f"device {tensor.device}")
        if tensor.shape[0] != query.shape[0]:
            raise mismatch(name, f"batch size {query.shape[0]}, that of query", tensor)
    if key.shape[3] != query.shape[3]:
        raise mismatch("key", f"last axis D = {query.shape[3]}, that of query", tensor_shape(key))
    if value.shape[1:3] != key.shape[1:3]:
        raise mismatch("value", f"(Hkv, S) = {tuple(key.shape[1:3])}, those of key", tensor_shape(value))
    raise mismatch("key", f"a number of heads that divides the {query.shape[1]} of query", tensor_shape(key))


def describe_dtype(tensor: Tensor) -> str:
    """Name a tensor's element type.

    Args:
        tensor: any.
    """
    return str(tensor.dtype).removeprefix("torch.")


def tensor_shape(tensor: Tensor) -> str:
    """Name a tensor's shape.

    Args:
        tensor: any.
    """
    return f"shape {tuple(tensor.shape)}"


def check_broadcastable(argument: str, tensor: Tensor, target: Sequence[int], axes: str) -> Tensor:
    """Check that a tensor broadcasts to a shape without enlarging it.

    Args:
        argument: the parameter's name.
        tensor: of any rank up to that of the target.
        target: the shape to reach.
        axes: the target's axes for the message, "B H L S" say.
    Returns:
        The tensor, viewed with the target's rank (its own axes of size 1 are kept).
    Raises:
        ValueError: it has more axes, or an axis that is neither 1 nor the target's.
    """
    fits = tensor.dim() <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(tensor.shape), reversed(target), strict=False)
    )
    if not fits:
        raise mismatch(argument, f"broadcastable to ({', '.join(axes.split())}) = {tuple(target)}", tensor)
    return tensor[(None,) * (len(target) - tensor.dim())]


def check_mask(argument: str, mask: Any, target: Sequence[int], axes: str = "B H L S") -> Tensor:
    """Check that a mask is boolean (True = may attend) and broadcasts to the scores.

    Args:
        argument: the parameter's name.
        mask: what the caller passed.
        target: the shape of the scores.
        axes: the target's axes for the message.
    Raises:
        ValueError: it is no boolean tensor, or does not broadcast.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise mismatch(argument, "a bool tensor (True = may attend)", describe(mask))
    return check_broadcastable(argument, mask, target, axes)


def check_bias(argument: str, bias: Any, target: Sequence[int], axes: str = "B H L S") -> Tensor:
    """Check that a bias is floating, free of NaN, and broadcasts to the scores.

    Args:
        argument: the parameter's name.
        bias: what the caller passed.
        target: the shape of the scores.
        axes: the target's axes for the message.
    Raises:
        ValueError: it is no floating tensor, has a NaN, or does not broadcast.
    """
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise mismatch(argument, "a floating tensor (a mask goes to attn_mask)", describe(bias))
    return check_no_nan(argument, check_broadcastable(argument, bias, target, axes))


def values_are_readable(tensor: Tensor) -> bool:
    """Tell whether looking at a tensor's values is cheap and possible here.

    It is not on an accelerator (the host would wait), inside ``torch.compile``, under ``torch.func`` transforms, nor
    for tensors without storage. Checks of values are left out there; checks of shapes and types never are.

    Args:
        tensor: any.
    """
    return (
        type(tensor) in _PLAIN and tensor.is_cpu and not _is_compiling() and not _is_transformed(tensor)
    )  # asked at every call of attention: names are looked up once


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Check that neither queries nor keys hold a NaN, as :func:`check_no_nan` does, with less to do where all is well.

    Args:
        query: floating.
        key: floating.
    Raises:
        ValueError: some element is NaN.
    """
    if not (values_are_readable(query) and values_are_readable(key)):
        return
    if math.isnan(query.detach().sum().item() + key.detach().sum().item()):
        check_no_nan("query", query)
        check_no_nan("key", key)


def check_through_output(output: Tensor, query: Tensor, key: Tensor) -> None:
    """Check as :func:`check_query_and_key` does, but look at one number per query of what came out first.

    Args:
        output: (B, H, L, Dv), computed such that a NaN of any query or key spoils a whole row of it.
        query: floating.
        key: floating.
    Raises:
        ValueError: some element of query or key is NaN.
    """
    if values_are_readable(output):
        seen = output.detach() if output.requires_grad else output
        if math.isnan(seen.select(-1, 0).sum().item()):
            check_query_and_key(query, key)


def check_no_nan(argument: str, tensor: Tensor) -> Tensor:
    """Check that no element is NaN, where :func:`values_are_readable`.

    Args:
        argument: the parameter's name.
        tensor: floating.
    Raises:
        ValueError: some element is NaN; the message counts them.
    """
    if not values_are_readable(tensor):
        return tensor
    if math.isnan(tensor.detach().sum().item()):  # NaN, or +inf met −inf: only now is it worth a second look
        count = int(tensor.isnan().sum())
        if count:
            raise mismatch(argument, "no NaN", f"{count} NaN of {tensor.numel()} elements")
    return tensor
