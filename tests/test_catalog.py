"""The catalog: every mechanism is in it, and does what its row says."""

from __future__ import annotations

import re

import pytest
import torch

import attnbook
from attnbook import catalog
from helpers import bibliography

ROWS = catalog.MECHANISMS


def test_every_mechanism_has_a_row():
    assert set(attnbook.mechanisms.__all__) <= set(ROWS)
    assert "attention" in ROWS
    for name, row in ROWS.items():
        assert row.function.__name__ == name


def test_the_catalog_cannot_be_changed():
    with pytest.raises(TypeError):
        ROWS["mine"] = None
    with pytest.raises(AttributeError):
        ROWS["attention"].paper = "mine"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_is_complete(row):
    assert row.paper in bibliography()
    assert row.causal in ("mask", "always", "no")
    assert re.fullmatch(r"O\(.+\)", row.time)
    assert re.fullmatch(r"O\(.+\)", row.memory)
    assert re.fullmatch(r"\d\d-[a-z0-9-]+", row.chapter)
    assert row.exact or row.error
    assert row.name


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.exact], ids=lambda row: row.function.__name__)
@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_mechanisms_compute_softmax_attention(row, is_causal):
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    expected = attnbook.reference.attention(q, k, v, is_causal=is_causal)
    assert torch.allclose(row.function(q, k, v, is_causal=is_causal), torch.from_numpy(expected))
