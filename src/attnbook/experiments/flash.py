"""The speed of exact attention on a GPU: the naive form, PyTorch's fused kernels, FlexAttention, and our Triton kernel.

Run it with ``python -m attnbook.experiments flash --device cuda``. Chapter: {ref}`sec-15-flash`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbook.bench.gpu import KERNELS, teraflops
from attnbook.experiments.grid import Experiment
from attnbook.functional import attention
from attnbook.shapes import check_choice, check_count, mismatch


def _seconds(function: Callable[[], Any], rounds: int, device: str) -> list[float]:
    """Time a function, after two calls for compilers and caches; wait for the device before and after each."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for number in range(rounds + 2):
        wait()
        started = time.perf_counter()
        function()
        wait()
        if number > 1:
            times.append(time.perf_counter() - started)
    return times


def measure(
    *,
    kernel: str,
    length: int,
    backward: bool,
    seed: int,
    heads: int = 32,
    head_dim: int = 64,
    tokens: int = 16_384,
    rounds: int = 20,
    device: str = "cuda",
) -> dict[str, Any]:
    """Time one kernel on normal queries, keys and values in bfloat16, without a mask.

    The batch is as large as the tokens allow, as in {cite}`dao2024`, section 4.1.

    Args:
        kernel: one of ``KERNELS``.
        length: L = S.
        backward: time forward and backward together.
        seed: of the data.
        heads: H.
        head_dim: D.
        tokens: in a batch.
        rounds: how often it is timed; the median counts.
        device: "cuda", or "cpu" to try the code.
    Returns:
        ``teraflops``, by the papers' formula for every kernel: forward 4·L²·D a head, backward 2.5 times that; the
        median ``seconds``; and the relative ``error`` of one head's output against float32. None for each where the
        memory did not suffice.
    Raises:
        ValueError: an unknown kernel, or no GPU where one is asked for.
    """
    check_choice("kernel", kernel, tuple(KERNELS))
    check_count("length", length)
    if device == "cuda" and not torch.cuda.is_available():
        raise mismatch("device", "a machine with a GPU that PyTorch sees", "none here")
    generator = torch.Generator().manual_seed(seed)
    shape = max(1, tokens // length), heads, length, head_dim
    q, k, v, g = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(4))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def run() -> Tensor:
        output = KERNELS[kernel](*inputs)
        if backward:
            torch.autograd.grad(output, inputs, g)
        return output.detach()

    try:
        times = sorted(_seconds(run, rounds, device))
        found = run()[:1, :1].float()
    except torch.OutOfMemoryError:
        return {"teraflops": None, "seconds": None, "error": None}
    exact = attention(*(x[:1, :1].detach().float() for x in inputs), backend="reference")
    middle = times[len(times) // 2]
    rate = teraflops(middle, length=length, head_dim=head_dim, heads=heads, batch_size=shape[0], backward=backward)
    return {
        "teraflops": rate,
        "seconds": middle,
        "error": float((found - exact).norm() / exact.norm()),
    }


EXPERIMENT = Experiment(
    "flash",
    [
        {"kernel": kernel, "length": length, "backward": backward, "seed": 0}
        for kernel in KERNELS
        for backward in (False, True)
        for length in (512, 1024, 2048, 4096, 8192, 16_384)
    ],
    measure,
)
