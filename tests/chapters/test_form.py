"""Every chapter has the form that the chapter standard asks for, as far as a program can see it."""

from pathlib import Path

import pytest

import form

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("check", form.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_the_form(path: Path, check):
    assert check(form.Chapter(path)) == []
