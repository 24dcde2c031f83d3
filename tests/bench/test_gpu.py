"""The GPU's suite, tried on the processor."""

from __future__ import annotations

import pytest
import torch

from attnbook.bench import gpu
from attnbook.bench.case import Timing, compare
from attnbook.measure import Ratio
from helpers import complains


def test_without_a_gpu_there_is_nothing_to_compare(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(gpu.suite()) == []
    assert capsys.readouterr().out == "no CUDA device here\n"


def test_rates_follow_the_papers_formula():
    settings = {"length": 1000, "head_dim": 64, "heads": 2, "batch_size": 3}
    assert gpu.teraflops(1e-3, **settings) == pytest.approx(4 * 1000**2 * 64 * 6 / 1e9)
    assert gpu.teraflops(1e-3, **settings, is_causal=True) == pytest.approx(2 * 1000**2 * 64 * 6 / 1e9)
    assert gpu.teraflops(1e-3, **settings, backward=True) == pytest.approx(14 * 1000**2 * 64 * 6 / 1e9)
    timing = Timing("a", Ratio(1, 1, 1), {"attnbook": 2e-3, "a": 1e-3})
    assert gpu.rates(timing, **settings)["a"] == 2 * gpu.rates(timing, **settings)["attnbook"]
    with complains("seconds: expected a number > 0, got 0"):
        gpu.teraflops(0, **settings)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernels_compute_the_same(is_causal):
    pytest.importorskip("triton")
    q, k, v = (torch.randn(1, 2, 32, 16) for _ in range(3))
    naive = gpu.KERNELS["naive"](q, k, v, is_causal=is_causal)
    for name in ("SDPA, FlashAttention", gpu.OURS):
        if name != gpu.OURS or not torch.cuda.is_available():
            torch.testing.assert_close(gpu.KERNELS[name](q, k, v, is_causal=is_causal), naive)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU")
def test_the_suite_runs_where_the_interpreter_does(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delitem(gpu.KERNELS, "FlexAttention, compiled")
    monkeypatch.setitem(gpu.KERNELS, "FlexAttention, compiled", gpu.KERNELS["naive"])  # compiling takes long
    lines = list(gpu.suite(batch_size=1, heads=1, length=16, head_dim=16, dtype=torch.float32, device="cpu"))
    assert [line.what for line in lines] == [
        "dense attention, forward",
        "dense attention, forward and backward",
        "chunked linear attention, forward and backward",
    ]
    for line in lines:
        assert "SDPA, FlashAttention" in line.peers
        assert "SDPA, cuDNN" not in line.peers  # it refuses the processor
        timing = compare(line, rounds=1)
        assert min(timing.seconds.values()) > 0
