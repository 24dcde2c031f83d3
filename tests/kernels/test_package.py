"""When Triton is loaded, what is said where it cannot be had, and that the kernels compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import SOURCE


def run(code: str) -> str:
    """Run a script in a fresh process, without the interpreter; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_triton_is_loaded_when_asked_for_and_missed_with_a_clear_word():
    run("""
import sys
import attnbook.kernels
assert "triton" not in sys.modules
assert "triton_attention" in dir(attnbook.kernels)
sys.modules["triton"] = None  # as if it were not installed
for name in ("triton_attention", "triton_linear_attention"):
    try:
        getattr(attnbook.kernels, name)
    except RuntimeError as error:
        assert isinstance(error, ImportError)
        assert str(error) == "attnbook.kernels: expected Triton (pip install 'attnbook[kernels]'), got none", error
    else:
        raise AssertionError("found")
""")


def test_other_names_are_not_there():
    import attnbook.kernels

    with pytest.raises(AttributeError, match=r"^module 'attnbook.kernels' has no attribute 'fast'$"):
        attnbook.kernels.fast  # noqa: B018


def test_without_the_interpreter_a_tensor_has_to_be_on_a_gpu_and_it_cannot_be_chosen_late():
    pytest.importorskip("triton")
    run("""
import os, sys, torch
from attnbook.kernels import triton_attention
q = torch.zeros(1, 1, 2, 4)
try:
    triton_attention(q, q, q)
except ValueError as error:
    assert str(error) == (
        "query: expected a tensor on a GPU (or TRITON_INTERPRET=1 in the environment, to try the kernels on the CPU), "
        "got device cpu"
    ), error
else:
    raise AssertionError("computed")
del sys.modules["attnbook.kernels.common"]
os.environ["TRITON_INTERPRET"] = "1"
try:
    import attnbook.kernels.common
except RuntimeError as error:
    assert str(error) == "TRITON_INTERPRET: expected to be set before Triton is imported, got set later", error
else:
    raise AssertionError("loaded")
""")


# The interpreter takes much that the compiler refuses. Compiling needs no GPU, only the name of one.
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

driver.set_active(Hopper())

def compile_only(kernel, grid):
    def call(*arguments, **options):
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        print(kernel.__name__, compiled.asm["ptx"].count("mma.sync") + compiled.asm["ptx"].count("wgmma.mma_async"))
    return call

triton.JITFunction.__getitem__ = compile_only
import attnbook.kernels.dense as dense, attnbook.kernels.linear as linear
dense.check_operand = linear.check_operand = lambda name, tensor, axes: tensor
q = torch.zeros(1, 2, 32, 16, dtype=torch.bfloat16, requires_grad=True)
bias, mask = torch.zeros(32, 32, requires_grad=True), torch.ones(32, 32, dtype=torch.bool)
options = {"bias": bias, "attn_mask": mask, "alibi_slopes": torch.ones(2), "is_causal": True}
tiles = dense.Tiles(*[dense.Tile(16, 16, 1, 1)] * 3)
dense.triton_attention(q, q, q[..., :12], tiles=tiles, **options).sum().backward()
linear.triton_linear_attention(q, q, q, chunk_size=16, normalize=False).sum().backward()
"""


def test_the_kernels_compile_for_tensor_cores(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    counts = [line.split() for line in run(COMPILE).splitlines()]
    assert {name for name, _ in counts} == {
        "_forward",
        "_row_sums",
        "_backward_keys",
        "_backward_queries",
        "_states",
        "_outputs",
    }
    assert all(int(count) > 0 for name, count in counts if name != "_row_sums")
