"""What the executed chapters say of themselves, and the numbers that they carry in their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

CLAIM = "application/vnd.attnbook.claim+json"
COLOPHON = "application/vnd.attnbook.colophon+json"
NAME = re.compile(r"notebooks/(\d\d)-")


@dataclass(frozen=True)
class Chapter:
    """One executed chapter.

    Attributes:
        name: of its file.
        title: its first heading.
        claims: their records, in order.
        colophon: what it took; empty where it was not executed to its end.
        cells: number of code cells.
        exercises: number of exercises.
    """

    name: str
    title: str
    claims: list[dict[str, Any]]
    colophon: dict[str, Any]
    cells: int
    exercises: int

    @property
    def number(self) -> int:
        """Its number in the book."""
        return int(self.name[:2])

    @property
    def docname(self) -> str:
        """Its name for Sphinx."""
        return f"notebooks/{self.name}"


def read(path: Path) -> Chapter:
    """Read one chapter."""
    notebook = nbformat.read(path, 4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    data = [output.data for cell in code for output in cell.outputs if "data" in output]
    title = re.search(r"^# (.+)$", prose, re.MULTILINE)
    colophons = [bundle[COLOPHON] for bundle in data if COLOPHON in bundle]
    return Chapter(
        name=path.stem,
        title=title.group(1).strip() if title else path.stem,
        claims=[dict(bundle[CLAIM]) for bundle in data if CLAIM in bundle],
        colophon=dict(colophons[-1]) if colophons else {},
        cells=len(code),
        exercises=len(re.findall(r"^`{3,}\{exercise(?:-start)?\}", prose, re.MULTILINE)),
    )


def read_all(root: Path) -> list[Chapter]:
    """Read all chapters of a source tree, in the order of their numbers."""
    return [read(path) for path in sorted((root / "notebooks").glob("*.ipynb"))]


def number_by_name(app: Any) -> None:
    """Number a chapter by its file's name: 15-flash is chapter 15, whether chapters 3 to 14 are there or not."""
    from docutils import nodes
    from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as Collector

    original = Collector.assign_section_numbers

    def assign_section_numbers(self: Any, env: Any) -> list[str]:
        updated = original(self, env)
        for docname, numbers in env.toc_secnumbers.items():
            match = NAME.match(docname)
            if not match:
                continue
            number = int(match.group(1))
            for anchor, value in numbers.items():
                numbers[anchor] = (number, *value[1:]) if value else value
            for node in [env.titles[docname], *env.tocs[docname].findall(nodes.reference)]:
                if node.get("secnumber"):
                    node["secnumber"] = [number, *node["secnumber"][1:]]
        return updated

    Collector.assign_section_numbers = assign_section_numbers
