"""Vocabularies and padded batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbook.data import END, PAD, START, UNKNOWN, Vocabulary, pad_batch, teacher_forcing
from helpers import complains


def test_the_most_frequent_come_first_ties_in_alphabetical_order():
    vocabulary = Vocabulary([["b", "a", "c"], ["c", "b"], ["c"]])
    assert vocabulary.tokens == ("<pad>", "<start>", "<end>", "<unknown>", "c", "b", "a")
    assert len(vocabulary) == 7
    assert vocabulary.encode(["a", "c", "z"]) == [6, 4, UNKNOWN]


def test_rare_tokens_are_unknown():
    vocabulary = Vocabulary([["a", "a", "b"]], min_count=2)
    assert vocabulary.encode(["a", "b"]) == [4, UNKNOWN]
    assert vocabulary.decode([4, UNKNOWN]) == ["a", "<unknown>"]


def test_decoding_stops_at_the_end_and_leaves_out_padding_and_start():
    vocabulary = Vocabulary(["abc"])
    assert vocabulary.decode([START, 4, PAD, 5, END, 6, END]) == ["a", "b"]
    assert vocabulary.decode([]) == []


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1), min_size=1))
def test_decoding_undoes_encoding(sequences):
    vocabulary = Vocabulary(sequences)
    for sequence in sequences:
        assert vocabulary.decode(vocabulary.encode(sequence)) == sequence
    assert (PAD, START, END, UNKNOWN) == (0, 1, 2, 3)


def test_pad_batch():
    found = pad_batch([[5, 6, 7], [8], [9, 10]])
    assert found.dtype == torch.int64
    assert found.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]


def test_teacher_forcing():
    inputs, outputs = teacher_forcing([[5, 6], [7], []])
    assert inputs.tolist() == [[START, 5, 6], [START, 7, 0], [START, 0, 0]]
    assert outputs.tolist() == [[5, 6, END], [7, END, 0], [END, 0, 0]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pad_batch([]), "sequences: expected at least one sequence, none of them empty, got []"),
        (lambda: pad_batch([[1], []]), "sequences: expected at least one sequence, none of them empty, got [1, 0]"),
        (lambda: teacher_forcing([]), "sequences: expected at least one sequence, none of them empty, got []"),
        (lambda: Vocabulary([], min_count=0), "min_count: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
