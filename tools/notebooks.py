"""Keep the chapters in the form in which they are committed.

    python tools/notebooks.py new NAME        begin drafts/NAME.md from tools/template.md
    python tools/notebooks.py text NAME …     write drafts/NAME.md, MyST text for editing
    python tools/notebooks.py build NAME …    turn drafts/NAME.md into notebooks/NAME.ipynb: executed, tidy
    python tools/notebooks.py run [NAME …]    execute chapters again and store what they print
    python tools/notebooks.py check           fail where a chapter is not in the committed form

The committed form: every code cell executed in order, text outputs only (no images, no markup that a figure or a table
makes anew), steady ids, little metadata.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "notebooks"
DRAFTS = ROOT / "drafts"
DROPPED = ("image/", "text/html", "text/latex", "application/vnd.plotly")


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the committed form of a notebook."""
    result = copy.deepcopy(notebook)
    result.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    result.nbformat, result.nbformat_minor = 4, 5
    count = 0
    for number, cell in enumerate(result.cells):
        cell["id"] = f"cell-{number:03d}"
        for key in ("execution", "lines_to_next_cell", "collapsed"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            cell.pop("attachments", None)
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            for mime in [mime for mime in output.get("data", {}) if mime.startswith(DROPPED)]:
                del output.data[mime]
    return result


def flaws(path: Path) -> list[str]:
    """Say in what a chapter differs from the committed form."""
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if any(cell.execution_count is None for cell in code):
        found.append("cells that were not executed")
    elif [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("cells executed out of order")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        found.append("an error among the outputs")
    if any(output.get("name") == "stderr" for cell in code for output in cell.outputs):
        found.append("output on stderr")
    if not found and notebook != tidy(notebook):
        found.append("images, markup or metadata that are made anew anyway")
    return found


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in a fresh kernel, in the chapters' folder."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(CHAPTERS)}}).execute()


def begin(name: str) -> str:
    """Return the template as the text of a new chapter.

    Args:
        name: two digits, a hyphen, and lower-case words: 03-multi-head.
    """
    if not re.fullmatch(r"\d\d(-[a-z0-9]+)+", name):
        sys.exit(f"expected a name like 03-multi-head, got {name!r}")
    text = (ROOT / "tools" / "template.md").read_text(encoding="utf-8")
    return text.replace("99-template", name).replace("99", name[:2]).replace("{{number}}", str(int(name[:2])))


def _store(notebook: nbformat.NotebookNode, name: str, started: float) -> None:
    nbformat.write(tidy(notebook), CHAPTERS / f"{name}.ipynb")
    print(f"{name}: executed in {time.monotonic() - started:.0f} s", flush=True)


def main(words: list[str]) -> None:
    """Do what the command line says."""
    import jupytext

    command, names = words[0], words[1:]
    everything = sorted(path.stem for path in CHAPTERS.glob("*.ipynb"))
    if command == "new" and names:
        DRAFTS.mkdir(exist_ok=True)
        path = DRAFTS / f"{names[0]}.md"
        if path.exists():
            sys.exit(f"{path} is there already")
        path.write_text(begin(names[0]), encoding="utf-8")
        print(path)
    elif command == "text":
        DRAFTS.mkdir(exist_ok=True)
        for name in names or everything:
            notebook = jupytext.read(CHAPTERS / f"{name}.ipynb")
            jupytext.write(notebook, DRAFTS / f"{name}.md", fmt="md:myst")
            print(DRAFTS / f"{name}.md")
    elif command == "build":
        for name in names:
            started = time.monotonic()
            notebook = jupytext.read(DRAFTS / f"{name}.md", fmt="md:myst")
            execute(notebook)
            _store(notebook, name, started)
    elif command == "run":
        for name in names or everything:
            started = time.monotonic()
            notebook = nbformat.read(CHAPTERS / f"{name}.ipynb", 4)
            execute(notebook)
            _store(notebook, name, started)
    elif command == "check":
        bad = {name: found for name in everything if (found := flaws(CHAPTERS / f"{name}.ipynb"))}
        for name, found in bad.items():
            print(f"{name}: {'; '.join(found)} (make it anew: python tools/notebooks.py run {name})")
        if bad:
            sys.exit(1)
        print(f"{len(everything)} chapters in the committed form")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
