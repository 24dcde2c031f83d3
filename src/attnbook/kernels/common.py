"""What the kernels have in common: Triton itself, and checks of what it can compute where."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from attnbook.kernels import MissingTriton
from attnbook.shapes import check_tensor, mismatch

try:
    import triton
    import triton.language as tl
except ImportError:
    raise MissingTriton("attnbook.kernels: expected Triton (pip install 'attnbook[kernels]'), got none") from None

INTERPRETED = bool(triton.knobs.runtime.interpret)  # every @triton.jit from here on runs in NumPy, on the CPU
if INTERPRETED and isinstance(tl.cdiv, triton.JITFunction):
    raise MissingTriton("TRITON_INTERPRET: expected to be set before Triton is imported, got set later")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_operand(name: str, tensor: Tensor, axes: str) -> Tensor:
    """Check that the kernels can compute with a tensor here: its type, and where it lies.

    Args:
        name: the parameter's name.
        tensor: what the caller passed.
        axes: its axes' names.
    Returns:
        The tensor.
    Raises:
        ValueError: another type; a tensor that is not on a GPU, unless the interpreter runs; bfloat16 if it does.
    """
    check_tensor(name, tensor, axes, dtypes=FLOATS)
    if INTERPRETED:
        if tensor.dtype == torch.bfloat16:
            expected = "a float32 or float16 tensor (Triton's interpreter multiplies bfloat16 wrongly)"
            raise mismatch(name, expected, tensor)
    elif tensor.device.type != "cuda":
        expected = "a tensor on a GPU (or TRITON_INTERPRET=1 in the environment, to try the kernels on the CPU)"
        raise mismatch(name, expected, f"device {tensor.device}")
    return tensor


def unit_stride(x: Tensor) -> Tensor:
    """Return the tensor, copied only if the elements of its last axis are not neighbours in memory.

    Args:
        x: any.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(size: int) -> int:
    """Return the size of a tile that holds so many columns: a power of two, at least 16.

    Args:
        size: of a head.
    """
    return max(16, triton.next_power_of_2(size))


def precision(x: Tensor) -> str:
    """Return how float32 products are made: as they are for float32 inputs, on tensor cores for half precision.

    Args:
        x: an operand of the call.
    """
    return "ieee" if x.dtype == torch.float32 else "tf32"


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make a tensor's GPU the one that kernels are launched on.

    Args:
        x: any.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
