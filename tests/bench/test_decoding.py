"""The comparisons of decoding: what is compared is alike."""

from __future__ import annotations

import pytest

from attnbook.bench import decoding

pytest.importorskip("transformers")


def test_all_produce_as_many_tokens(monkeypatch):
    monkeypatch.setattr(decoding, "NEW", 3)
    assert decoding.CONFIG.num_parameters() == 10_770_816  # what Hugging Face's GPT-2 of this shape has
    single, reading, eight = decoding.suite()
    assert single.ours().shape == single.peers["Hugging Face GPT-2"]().shape == (1, 4)
    assert eight.ours().shape == (8, 4)
    assert {peer().shape for peer in eight.peers.values()} == {(8, 4)}
    assert reading.peers["reading the weights"]() is None
    assert [round(1 / line.goal, 2) for line in (single, reading, eight)] == [2.2, 0.5, 1.8]


def test_reading_reads_every_matrix(monkeypatch):
    monkeypatch.setattr(decoding, "NEW", 1)
    read = []
    monkeypatch.setattr(decoding.torch, "mv", lambda matrix, vector: read.append(matrix.numel()))
    config = decoding.CONFIG
    decoding.reading(decoding.Decoder(config))()
    assert sum(read) == config.vocab_size * config.width + 12 * config.depth * config.width**2
