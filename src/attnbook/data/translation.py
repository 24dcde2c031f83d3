"""Sentences and their translations."""

from __future__ import annotations

import gzip

from attnbook.data.base import Card, Source
from attnbook.shapes import check_choice

_HASHES = {
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    "test_2017_flickr.de.gz": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
    "test_2017_flickr.en.gz": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
    "test_2017_flickr.fr.gz": "3ba671ceb2299f3304ffafefea7a833d08632fbaf0ba18546f8a2ec2391af496",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
}
SPLITS = {"train": "train", "validation": "val", "test": "test_2016_flickr", "test_2017": "test_2017_flickr"}
LANGUAGES = ("en", "de", "fr")

CARDS = {
    "multi30k": Card(
        name="multi30k",
        title="Multi30k",
        content="English image captions with German and French translations: 29,000 for training, 1,014 for "
        "validation, and two test sets of 1,000.",
        licence="none stated for the text",
        citation=("elliott2016",),
        home="https://github.com/multi30k/dataset",
        returns='a list of (source, target) sentences; options source="en", target="de" (each "en", "de" or "fr"), '
        'split="train", "validation", "test" (2016) or "test_2017".',
        sources=tuple(
            Source(name, sha256, f"https://github.com/multi30k/dataset/raw/master/data/task1/raw/{name}")
            for name, sha256 in _HASHES.items()
        ),
    )
}


def _load(source: str = "en", target: str = "de", split: str = "train") -> list[tuple[str, str]]:
    check_choice("source", source, LANGUAGES)
    check_choice("target", target, LANGUAGES)
    stem = SPLITS[check_choice("split", split, tuple(SPLITS))]
    sides = []
    for language in (source, target):
        content = gzip.decompress(CARDS["multi30k"].read(f"{stem}.{language}.gz")).decode("utf-8")
        sides.append([line.strip() for line in content.strip().split("\n")])
    return list(zip(*sides, strict=True))


LOADERS = {"multi30k": _load}
