"""The suites: what each compares is the same function, and every line can be measured."""

from __future__ import annotations

import pytest
import torch

from attnbook import bench
from attnbook.bench import __main__, graph, linear, normalizers, sparse, state
from attnbook.bench.case import Comparison


def agree(line: Comparison, **tolerance: float) -> None:
    """Check that our form and the peers of a line return the same."""
    ours = line.ours()
    assert ours is not None
    for name, peer in line.peers.items():
        torch.testing.assert_close(peer(), ours, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def _eager(monkeypatch):
    """Leave out compilation, which takes long and changes no value."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("_eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_sparse_patterns_equal_masks_and_flex_attention(monkeypatch):
    monkeypatch.setattr(sparse, "LENGTH", 128)
    monkeypatch.setattr(sparse, "WINDOW", 16)
    lines = list(sparse.suite())
    assert [line.what for line in lines].count("sliding window, forward") == 2
    for line in lines:
        loose = {"rtol": 0.03, "atol": 0.03} if "bfloat16" in line.setting else {"rtol": 1e-4, "atol": 1e-5}
        agree(line, **loose)


def test_linear_attention_in_chunks_equals_running_sums(monkeypatch):
    monkeypatch.setattr(linear, "LENGTH", 96)
    lines = list(linear.suite())
    assert [line.goal for line in lines] == [0.45, 1 / 40, 0.25, 1 / 40]
    for line in lines:
        if "running sums" in line.peers:
            agree(line, rtol=1e-3, atol=1e-4)
        else:  # softmax attention is another function, of the same shape
            assert [x.shape for x in line.ours()] == [x.shape for x in line.peers["SDPA"]()]


def test_states_in_chunks_equal_their_recurrence(monkeypatch):
    monkeypatch.setattr(state, "LENGTH", 96)
    lines = list(state.suite())
    assert len(lines) == 8
    for line in lines:
        if "recurrent" in line.peers:
            torch.testing.assert_close(line.peers["recurrent"](), line.ours(), rtol=1e-3, atol=1e-4)
            assert line.peers["SDPA"]().shape == line.ours().shape
        else:
            assert line.ours() is line.peers["SDPA"]() is None


@pytest.mark.usefixtures("_eager")
def test_normalisers_equal_the_packages_that_sort():
    pytest.importorskip("entmax")
    lines = list(normalizers.suite())
    assert len(lines) == 6
    for line in lines:
        agree(line, rtol=1e-4, atol=1e-6)


def test_graph_attention_equals_the_package():
    pytest.importorskip("torch_geometric")
    cora, drawn = graph.suite()
    agree(cora, rtol=1e-4, atol=1e-5)
    assert "Cora" in cora.setting
    agree(drawn, rtol=1e-3, atol=1e-3)
    assert drawn.ours().shape == (20_000, 128)  # the gradient of the features


def test_every_name_is_a_suite():
    for name in bench.SUITES:
        assert callable(__main__.import_module(f"attnbook.bench.{name}").suite)
    assert set(bench.BESIDE_NANOGPT) <= set(bench.SUITES)
