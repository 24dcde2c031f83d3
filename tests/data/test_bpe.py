"""Byte-pair encoding against a naive re-count, a calculation by hand, and any bytes at all."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbook.data.bpe import BytePairEncoding, merge, pieces
from helpers import complains, loaded

SHORT = "low low low low low lower lower newest newest newest newest newest newest widest widest widest"


def naive(text, vocab_size):
    """Learn merges by counting all pairs anew each time, over the whole text, with the pieces kept apart."""
    sequence = []
    for piece in pieces(text):
        sequence += [*piece, None]
    merges = []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for pair in pairwise(sequence) if None not in pair)
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        new, i, out = 256 + len(merges), 0, []
        while i < len(sequence):
            if tuple(sequence[i : i + 2]) == best:
                out.append(new)
                i += 2
            else:
                out.append(sequence[i])
                i += 1
        sequence = out
        merges.append(best)
    return merges, [token for token in sequence if token is not None]


def test_a_small_example_by_hand():
    # e-s is seen nine times (so are s-t and, later, es-t); then l-o and o-w seven times each.
    tokeniser = BytePairEncoding.train(SHORT, 260)
    assert tokeniser.tokens[256:] == [b"es", b"est", b"lo", b"low"]
    assert [tokeniser.tokens[t] for t in tokeniser.encode("lowest")] == [b"low", b"est"]


@pytest.mark.parametrize("vocab_size", [256, 257, 270, 330, 400])
def test_equals_a_naive_recount(vocab_size):
    text = (SHORT + " aaaa aaa aa the then there, there! 1600 1601\n\n  a  b\tc ").encode() * 2 + bytes(range(256))
    merges, sequence = naive(text, vocab_size)
    tokeniser = BytePairEncoding.train(text, vocab_size)
    assert tokeniser.merges == merges
    assert tokeniser.encode(text).tolist() == sequence


@given(st.text("ab \n", max_size=60), st.integers(256, 270))
def test_equals_a_naive_recount_on_texts_full_of_overlaps(text, vocab_size):
    merges, sequence = naive(text.encode(), vocab_size)
    tokeniser = BytePairEncoding.train(text, vocab_size)
    assert tokeniser.merges == merges
    assert tokeniser.encode(text).tolist() == sequence


TRAINED = BytePairEncoding.train(SHORT, 270)


@given(st.binary(max_size=200))
def test_any_bytes_come_back(content):
    assert b"".join(pieces(content)) == content
    tokens = TRAINED.encode(content)
    assert tokens.dtype == torch.int64
    assert TRAINED.decode_bytes(tokens) == content
    assert TRAINED.decode_bytes(tokens.tolist()) == content


@given(st.text(max_size=100))
def test_any_text_comes_back(text):
    content = text.encode("utf-8", errors="replace").decode()  # lone surrogates have no UTF-8
    assert TRAINED.decode(TRAINED.encode(content)) == content


def test_tinyshakespeare_comes_back_and_shrinks():
    text = loaded("tinyshakespeare").text[:200_000]
    tokeniser = BytePairEncoding.train(text, 512)
    tokens = tokeniser.encode(text)
    assert len(tokeniser) == 512
    assert tokeniser.decode(tokens) == text
    assert len(tokens) < 0.6 * len(text)
    assert b" the" in tokeniser.tokens


def test_merges_alone_make_the_same_tokeniser():
    again = BytePairEncoding(TRAINED.merges)
    assert again.tokens == TRAINED.tokens
    assert torch.equal(again.encode(SHORT), TRAINED.encode(SHORT))


def test_no_merge_crosses_a_piece():
    tokeniser = BytePairEncoding.train("ab ab ab 12 ab12" * 20, 300)
    assert not any(b"b1" in token or b" " in token[1:] for token in tokeniser.tokens)


def test_training_stops_where_no_pair_is_left():
    tokeniser = BytePairEncoding.train("aa", 300)
    assert tokeniser.merges == [(97, 97)]
    assert len(BytePairEncoding.train("", 300)) == 256


def test_merge_replaces_from_the_left():
    assert merge([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    assert merge([], (1, 1), 9) == []


def test_half_a_character_is_replaced_only_when_decoded_as_text():
    tokens = BytePairEncoding().encode("é")
    assert len(tokens) == 2
    assert BytePairEncoding().decode(tokens[:1]) == "\ufffd"
    assert BytePairEncoding().decode_bytes(tokens[:1]) == "é".encode()[:1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BytePairEncoding.train("a", 255), "vocab_size: expected an integer ≥ 256, got 255"),
        (lambda: BytePairEncoding.train(7, 300), "text: expected a string or bytes, got 7"),
        (lambda: TRAINED.encode(None), "text: expected a string or bytes, got None"),
        (lambda: TRAINED.decode([0, 270]), "tokens: expected integers in [0, 269], got 0 to 270"),
        (lambda: TRAINED.decode([-1]), "tokens: expected integers in [0, 269], got -1 to -1"),
        (lambda: BytePairEncoding([(0, 256)]), "merges: expected new pairs of tokens below 256, got (0, 256)"),
        (lambda: BytePairEncoding([(0, 1), (0, 1)]), "merges: expected new pairs of tokens below 257, got (0, 1)"),
        (lambda: BytePairEncoding([(0, 1, 2)]), "merges: expected new pairs of tokens below 256, got (0, 1, 2)"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()


def test_the_order_of_the_text_decides_nothing_but_counts():
    words = SHORT.split()
    random.Random(0).shuffle(words)
    assert BytePairEncoding.train(" " + " ".join(words), 270).merges == BytePairEncoding.train(" " + SHORT, 270).merges
