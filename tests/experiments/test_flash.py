"""The GPU experiment of chapter 15, tried on the processor."""

from __future__ import annotations

import json

import pytest
import torch

from attnbook.experiments import flash

SMALL = {"length": 32, "seed": 0, "heads": 2, "head_dim": 8, "tokens": 64, "rounds": 3, "device": "cpu"}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kernel", ["naive", "SDPA, FlashAttention"])
def test_a_kernel_is_timed_and_compared(kernel, backward):
    outcome = flash.measure(kernel=kernel, backward=backward, **SMALL)
    assert json.loads(json.dumps(outcome)) == outcome
    assert outcome["seconds"] > 0
    flops = 2 * 32 * 32 * 16 * 2 * 2 * (3.5 if backward else 1)  # L S (D + Dv), two heads, two sequences
    assert outcome["teraflops"] == pytest.approx(flops / outcome["seconds"] / 1e12)
    assert outcome["error"] < 0.02


def test_what_does_not_fit_is_reported_and_not_raised(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(flash.KERNELS, "naive", full)
    outcome = flash.measure(kernel="naive", backward=False, **SMALL)
    assert outcome == {"teraflops": None, "seconds": None, "error": None}


def test_unknown_kernels_and_missing_devices_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"^kernel: expected .*, got 'fast'$"):
        flash.measure(kernel="fast", backward=False, **SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: expected a machine with a GPU that PyTorch sees, got none here$"):
        flash.measure(kernel="naive", length=32, backward=False, seed=0)


def test_every_kernel_is_measured_at_every_length_in_both_directions():
    cells = flash.EXPERIMENT.cells
    assert {cell["kernel"] for cell in cells} == set(flash.KERNELS)
    assert len(cells) == len(flash.KERNELS) * 2 * 6
