"""When two outputs agree: words and integers exactly, decimals within 2 %, claims by their own tolerance."""

import pytest

from compare import CLAIM, GLUE, compare, text_difference


def shown(**data):
    return {"output_type": "display_data", "metadata": {}, "data": data}


def glued(name, value):
    return {"output_type": "display_data", "metadata": {"scrapbook": {"name": name}}, "data": {GLUE: value}}


def claimed(measured, expected=1.0):
    record = {"id": "99-x", "measured": measured, "values": [measured], "interval": None, "expected": expected}
    return shown(**{"text/plain": f"✓ 99-x: {measured}", CLAIM: record})


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("loss 1.000", "loss 1.019"),
        ("1.5e-08 left", "1.51e-08 left"),
        ("−0.50 and 2.00", "−0.505 and 1.99"),
        ("a  b", "a b"),
        ("3 of 4", "3 of 4"),
        ("x = 0.0", "x = 0.0000004"),
    ],
)
def test_texts_that_agree(expected, found):
    assert text_difference(expected, found) is None


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("loss 1.000", "loss 1.021"),
        ("loss 1.000", "gain 1.000"),
        ("3 of 4", "3 of 5"),
        ("1.0 2.0", "1.0"),
        ("one line", "one line\nand another"),
        ("1.0", "nan"),
        ("version 2.13.0", "version 2.14.0"),
        ("−0.5", "0.5"),
    ],
)
def test_texts_that_differ(expected, found):
    assert text_difference(expected, found)


def test_a_difference_shows_both_texts():
    assert text_difference("a 1.0", "a 2.0") == "expected 'a 1.0'\n  got      'a 2.0'"


def test_a_claim_may_move_within_its_own_tolerance_but_not_change_what_it_says():
    assert compare([claimed(1.0)], [claimed(1.3)]).differences == []
    assert compare([claimed(1.0)], [claimed(1.0, expected=2.0)]).differences == [
        "claim: expected: expected 1.0, got 2.0"
    ]


def test_the_value_that_a_claim_glues_is_judged_with_it_and_others_are_not():
    old, new = [claimed(1.0), glued("99-x", "1.0")], [claimed(1.3), glued("99-x", "1.3")]
    assert compare(old, new).differences == []
    assert compare([glued("other", "1.0")], [glued("other", "1.3")]).differences


def test_images_and_markup_are_left_out_and_missing_results_are_not():
    assert compare([shown(**{"text/plain": "x"})], [shown(**{"text/plain": "x", "text/html": "<b>"})]).differences == []
    assert compare([shown(**{"text/plain": "x"})], []).differences == ["expected 1 displayed results, got 0"]


def test_streams_are_joined_and_stderr_is_no_exception():
    pieces = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("a\n", "b\n")]
    whole = [{"output_type": "stream", "name": "stdout", "text": "a\nb\n"}]
    assert compare(whole, pieces).differences == []
    assert compare([], [{"output_type": "stream", "name": "stderr", "text": "warning"}]).differences


def test_what_was_compared_is_counted():
    outputs = [shown(**{"text/plain": "x"}), claimed(1.0), glued("99-x", "1.0"), glued("other", "1.0")]
    result = compare(outputs, outputs)
    assert (result.compared, result.judged) == (2, 1)
