"""A chapter is executed again when anything changes that it depends on, and only then."""

import nbformat
import pytest

import execute

CODE = """
%matplotlib inline
from attnbook import data, masks
from attnbook.experiments import outcomes
list(outcomes("scan"))
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A house of one chapter, with the library's own sources copied."""
    import shutil

    for name in ("src", "tools"):
        shutil.copytree(execute.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(execute.ROOT / "requirements-lock.txt", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scan.json").write_text("{}")
    (tmp_path / "results" / "scaling.json").write_text("{}")
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbformat.write(notebook, tmp_path / "notebooks" / "99-x.ipynb")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "SOURCE", tmp_path / "src")
    execute.dependencies.cache_clear()
    yield tmp_path
    execute.dependencies.cache_clear()


def key(house):
    execute.dependencies.cache_clear()
    return execute.key(house / "notebooks" / "99-x.ipynb")


def append(path, text="\n# changed\n"):
    path.write_text(path.read_text() + text)


def test_the_key_is_stable(house):
    assert key(house) == key(house)


@pytest.mark.parametrize(
    "name",
    [
        "src/attnbook/masks.py",  # imported
        "src/attnbook/shapes.py",  # imported by what is imported
        "src/attnbook/data/scan.py",  # loaded by name, by a package that is imported
        "src/attnbook/__init__.py",
        "results/scan.json",  # named in the code
        "requirements-lock.txt",
        "tools/compare.py",
    ],
)
def test_the_key_changes_with_what_the_chapter_uses(house, name):
    before = key(house)
    append(house / name)
    assert key(house) != before


@pytest.mark.parametrize("name", ["src/attnbook/models/ngram.py", "src/attnbook/measure.py", "results/scaling.json"])
def test_the_key_stays_when_something_else_changes(house, name):
    before = key(house)
    append(house / name)
    assert key(house) == before


def test_the_key_changes_with_the_committed_outputs(house):
    before = key(house)
    path = house / "notebooks" / "99-x.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text="1.0")]
    nbformat.write(notebook, path)
    assert key(house) != before


def test_imports_are_found_wherever_they_stand():
    code = "import attnbook as ab\ndef f():\n    from attnbook.models import Decoder\nab.layers\nimport torch"
    assert execute.imports(code) == {"attnbook", "attnbook.layers", "attnbook.models"}
