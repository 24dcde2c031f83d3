"""The template of a chapter is itself a chapter: it executes, and it passes every check."""

import jupytext
import nbformat
import pytest

import form
import notebooks


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    notebook = jupytext.reads(notebooks.begin("98-example"), fmt="md:myst")
    notebooks.execute(notebook)
    path = tmp_path_factory.mktemp("template") / "98-example.ipynb"
    nbformat.write(notebooks.tidy(notebook), path)
    return path


@pytest.mark.parametrize("check", form.CHECKS, ids=lambda check: check.__name__)
def test_the_template_passes(chapter, check):
    assert check(form.Chapter(chapter)) == []


def test_the_template_is_in_the_committed_form(chapter):
    assert notebooks.flaws(chapter) == []


@pytest.mark.parametrize("name", ["multi-head", "3-multi-head", "03_multi", "03-Multi"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(SystemExit, match="expected a name like 03-multi-head, got"):
        notebooks.begin(name)
