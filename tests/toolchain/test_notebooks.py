"""The committed form of a chapter."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import notebooks


def executed():
    figure = new_output(
        "execute_result", {"text/plain": "[figure]", "text/html": "<svg/>", "image/png": "AAAA"}, execution_count=7
    )
    cell = new_code_cell(
        "show()", execution_count=7, outputs=[figure], metadata={"execution": {"x": "1"}, "tags": ["t"]}
    )
    return new_notebook(cells=[new_markdown_cell("# Title"), cell, new_code_cell("x = 1", execution_count=9)])


def test_tidy_keeps_text_and_counts_from_one():
    tidy = notebooks.tidy(executed())
    assert [cell.get("execution_count") for cell in tidy.cells] == [None, 1, 2]
    assert tidy.cells[1].outputs[0].data == {"text/plain": "[figure]"}
    assert tidy.cells[1].outputs[0].execution_count == 1
    assert tidy.cells[1].metadata == {"tags": ["t"]}
    assert [cell.id for cell in tidy.cells] == ["cell-000", "cell-001", "cell-002"]


def test_tidy_leaves_its_input_and_is_settled_after_once():
    notebook = executed()
    tidy = notebooks.tidy(notebook)
    assert "image/png" in notebook.cells[1].outputs[0].data
    assert notebooks.tidy(tidy) == tidy


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (lambda nb: nb.cells[1].update(execution_count=None), "cells that were not executed"),
        (lambda nb: nb.cells[2].update(execution_count=1), "cells executed out of order"),
        (lambda nb: nb.cells[2].outputs.append(new_output("error", ename="E")), "an error among the outputs"),
        (lambda nb: nb.cells[2].outputs.append(new_output("stream", name="stderr", text="w")), "output on stderr"),
        (lambda nb: nb.cells[1].outputs[0].data.update({"image/png": "A"}), "images, markup or metadata"),
    ],
)
def test_flaws_are_named(tmp_path, damage, flaw):
    notebook = notebooks.tidy(executed())
    nbformat.write(notebook, tmp_path / "good.ipynb")
    assert notebooks.flaws(tmp_path / "good.ipynb") == []
    damage(notebook)
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    assert any(flaw in found for found in notebooks.flaws(tmp_path / "bad.ipynb"))


def test_every_chapter_is_in_the_committed_form():
    for path in sorted(notebooks.CHAPTERS.glob("*.ipynb")):
        assert notebooks.flaws(path) == [], path.name
