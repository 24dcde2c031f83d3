"""SCAN: commands in simplified English and the actions that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from attnbook.data.base import Card, Source
from attnbook.shapes import check_choice

_HASHES = {
    "tasks.txt": ("d824c7d9e9149ba497e25f701981dac79954e04bf670d22e5c209f076ac6c89f", ""),
    "tasks_train_simple.txt": ("941bb8a088c5f53ceff12fde902dc008933cf0c4203cc672c47b5f79d73262dd", "simple_split/"),
    "tasks_test_simple.txt": ("1fe1c8f5a19d0dc40e41bab94278f45f66f3dc415a978bd29855a23440610fc6", "simple_split/"),
    "tasks_train_length.txt": ("b034212dc7cf87ce62f3a067dd6ad49c4d5cd18d51d615d13825516bcb1ebbc2", "length_split/"),
    "tasks_test_length.txt": ("0760752ed34a75116ae11dcc1ee17526b7500060da1366540730fa24894d7db3", "length_split/"),
    "tasks_train_addprim_jump.txt": (
        "e3c78485692e028eed4205e1b8b3fd0e785ef2c12d45b5b89204dadf5b239e23",
        "add_prim_split/",
    ),
    "tasks_test_addprim_jump.txt": (
        "8147ae2651422c701162e174d9d66158daa57858a26b30317ac61797118ac7a5",
        "add_prim_split/",
    ),
    "tasks_train_addprim_turn_left.txt": (
        "1b3fed86055dd7689d217f1b90cc8960aeb1cf200f4f209dc47935761b05304c",
        "add_prim_split/",
    ),
    "tasks_test_addprim_turn_left.txt": (
        "15a82c2d25ac7c3c1fff7e18051fb085974ef3617de895c520d02144396a10e2",
        "add_prim_split/",
    ),
}
SPLITS = {"simple": "simple", "length": "length", "jump": "addprim_jump", "turn_left": "addprim_turn_left"}

CARDS = {
    "scan": Card(
        name="scan",
        title="SCAN",
        content="20,910 commands, made by a grammar, with their action sequences; splits that ask for generalisation.",
        licence="BSD",
        citation=("lake2018",),
        home="https://github.com/brendenlake/SCAN",
        returns='a list of (command, actions), each a tuple of words; options split="all" (from our grammar, no file '
        'needed) or "simple", "length", "jump", "turn_left" (the published files), part="train" or "test".',
        sources=tuple(
            Source(name, sha256, f"https://raw.githubusercontent.com/brendenlake/SCAN/master/{folder}{name}")
            for name, (sha256, folder) in _HASHES.items()
        ),
        note="Training files of the jump and turn_left splits repeat the lone primitive, until it makes up a tenth.",
    )
}

Pair = tuple[tuple[str, ...], tuple[str, ...]]
PRIMITIVES = {"walk": "I_WALK", "look": "I_LOOK", "run": "I_RUN", "jump": "I_JUMP"}
_TURNS = {"left": "I_TURN_LEFT", "right": "I_TURN_RIGHT"}


def verb_phrases() -> Iterator[Pair]:
    """Yield what a command repeats and joins: a verb, with a direction or without."""
    for verb, action in PRIMITIVES.items():
        yield (verb,), (action,)
    for verb in (*PRIMITIVES, "turn"):
        action = (PRIMITIVES[verb],) if verb in PRIMITIVES else ()
        for side, turn in _TURNS.items():
            yield (verb, side), (turn, *action)
            yield (verb, "opposite", side), (turn, turn, *action)
            yield (verb, "around", side), (turn, *action) * 4


def generate() -> list[Pair]:
    """Enumerate SCAN from its grammar and its interpretation ({cite}`lake2018`, supplement, figs. 6 and 7).

    Returns:
        All 20,910 pairs of a command and its actions.
    """
    phrases = list(verb_phrases())
    sentences = phrases + [
        ((*command, word), actions * times)
        for word, times in (("twice", 2), ("thrice", 3))
        for command, actions in phrases
    ]
    joined = []
    for first, one in sentences:
        for second, two in sentences:
            joined.append(((*first, "and", *second), one + two))
            joined.append(((*first, "after", *second), two + one))
    return sentences + joined


def _load(split: str = "all", part: str = "train") -> list[Pair]:
    check_choice("split", split, ("all", *SPLITS))
    check_choice("part", part, ("train", "test"))
    if split == "all":
        return generate()
    content = CARDS["scan"].read(f"tasks_{part}_{SPLITS[split]}.txt").decode("ascii")
    matches = re.findall(r"IN: (.*?) OUT: (.*?)\s*$", content, re.MULTILINE)
    return [(tuple(command.split()), tuple(actions.split())) for command, actions in matches]


LOADERS = {"scan": _load}
