"""The book's Sphinx extension: pages made from the executed chapters, and what the stock extensions leave out."""

from __future__ import annotations

import html
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import chapters
import library_pages
import page_fixes
from tables import lines_of, table

REPOSITORY = "https://github.com/attnbook/attnbook"


def _chapters(app: Sphinx) -> None:
    """Read the executed chapters: their claims, and what they took. A claim's name may be used once in the book."""
    found = chapters.read_all(Path(app.srcdir))
    seen: dict[str, str] = {}
    for chapter in found:
        for claim in chapter.claims:
            if claim["id"] in seen:
                raise ExtensionError(f"claim {claim['id']!r} stands in {seen[claim['id']]} and in {chapter.name}")
            seen[claim["id"]] = chapter.name
    app.attnbook_chapters = found


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


class Ledger(SphinxDirective):
    """All claims of the book, a table for each chapter, made from what the chapters left in their outputs."""

    def run(self) -> list[nodes.Node]:
        """Build the tables."""
        self.env.note_reread()
        result: list[nodes.Node] = []
        every = [chapter for chapter in self.env.app.attnbook_chapters if chapter.claims]
        total = sum(len(chapter.claims) for chapter in every)
        text = f"{total} claims in {len(every)} chapters; all of them held when this book was built."
        result.append(nodes.paragraph("", text))
        for chapter in every:
            result.append(nodes.rubric("", f"Chapter {chapter.number}. {chapter.title}"))
            rows = [self._row(chapter, claim) for claim in chapter.claims]
            header = ["Holds", "Claim", "Claimed", "Measured", "Seeds", "The paper's value", "Source"]
            result.append(table(header, rows, "ledger", f"Claims of {chapter.name}"))
        return result

    def _row(self, chapter: chapters.Chapter, claim: dict[str, Any]) -> list[str]:
        link = f"../{chapter.docname}.html#claim-{claim['id']}"
        sign = {"near": "±", "at least": "less", "at most": "plus"}[claim["relation"]]
        slack = f" {sign} {claim['tolerance']}" if claim["tolerance"] not in (0, 0.0, "0%") else ""
        relation = {"near": "≈", "at least": "≥", "at most": "≤"}[claim["relation"]]
        spread = f" ± {claim['interval']:.2g}" if claim["interval"] is not None else ""
        return [
            "✓" if claim["holds"] else "✗",
            f'<a href="{link}">{html.escape(claim["note"] or claim["id"])}</a><br><code>{claim["id"]}</code>',
            f"{relation} {_number(claim['expected'])}{slack}",
            _number(claim["measured"]) + spread,
            str(len(claim["values"])),
            html.escape(claim["paper"]) or "–",
            html.escape(claim["source"]),
        ]


class Status(SphinxDirective):
    """What each chapter took when it was executed for this book."""

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        self.env.note_reread()
        rows, device = [], ""
        for chapter in self.env.app.attnbook_chapters:
            took = chapter.colophon
            device = device or took.get("device", "")
            rows.append(
                [
                    f'<a href="../{chapter.docname}.html">{chapter.number}. {html.escape(chapter.title)}</a>',
                    str(chapter.cells),
                    str(len(chapter.claims)),
                    str(chapter.exercises),
                    f"{took.get('cpu_seconds', 0):.0f} s" if took else "–",
                    f"{took['peak_mib']} MiB" if took.get("peak_mib") else "–",
                ]
            )
        header = ["Chapter", "Code cells", "Claims held", "Exercises", "Processor time", "Peak memory"]
        line = f"Executed on one thread of: {device}." if device else ""
        return [table(header, rows, "status", "Status of the chapters"), nodes.paragraph("", line)]


class Contents(SphinxDirective):
    """The whole table of contents: chapters that exist are links, those to come are not."""

    def run(self) -> list[nodes.Node]:
        """Build the list."""
        self.env.note_reread()
        path = Path(self.env.srcdir, "book", "chapters.yml")
        self.env.note_dependency(str(path))
        here = {chapter.name: chapter for chapter in self.env.app.attnbook_chapters}
        parts = []
        for part in yaml.safe_load(path.read_text(encoding="utf-8")):
            items = []
            for entry in part["chapters"]:
                number, title = int(entry["name"][:2]), html.escape(entry["title"])
                summary = html.escape(entry["about"])
                if entry["name"] in here:
                    name = f'<a href="{self._link(here[entry["name"]].docname)}">{title}</a>'
                    items.append(f'<li value="{number}">{name}<span class="about">{summary}</span></li>')
                else:
                    items.append(
                        f'<li value="{number}" class="to-come">{title} <span class="badge">to come</span>'
                        f'<span class="about">{summary}</span></li>'
                    )
            parts.append(
                f'<p class="rubric">{html.escape(part["part"])}</p><ol class="book-contents">{"".join(items)}</ol>'
            )
        return [nodes.raw("", "".join(parts), format="html")]

    def _link(self, docname: str) -> str:
        return self.env.app.builder.get_relative_uri(self.env.docname, docname)


class DataCards(SphinxDirective):
    """A section for each data set, made from the library's cards."""

    def run(self) -> list[nodes.Node]:
        """Build the sections."""
        from attnbook import data

        result: list[nodes.Node] = []
        for name in data.names():
            card = data.card(name)
            section = nodes.section(ids=[f"data-{name}"], names=[f"data-{name}"])
            section += nodes.title("", card.title)
            cites = ", ".join(f"{{cite:t}}`{key}`" for key in card.citation)
            files = "\n".join(
                f"  - `{source.name}`, SHA-256 `{source.sha256[:16]}…`, from <{source.url}>"
                for source in card.sources[:4]
            )
            more = len(card.sources) - 4
            files += f"\n  - … and {more} more, listed in the card" if more > 0 else ""
            text = [
                f"`data.load({name!r})`",
                "",
                card.content,
                "",
                f"- **Licence:** {card.licence}",
                f"- **Cite:** {cites}",
                f"- **Home:** <{card.home}>",
                f"- **Returns:** {card.returns}",
                f"- **Files:**\n{files}",
                *([f"- **Mind:** {card.note}"] if card.note else []),
            ]
            box = nodes.Element()
            self.state.nested_parse(lines_of(text, "data cards"), self.content_offset, box)
            section += box.children
            result.append(section)
        return result


def _myst_roles(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write roles in MyST's way; autodoc reads reStructuredText's, and finds short names."""
    for i, line in enumerate(lines):
        line = re.sub(r"\{([\w:]+)\}`([^`]+)`", r":\1:`\2`", line)
        lines[i] = re.sub(r":(func|class):`(?:attnbook\.(?:mechanisms|models)\.)?(\w+)`", r":\1:`.\2`", line)


def _source_address(domain: str, info: dict[str, str]) -> str | None:
    """Return where the source of a documented object is shown."""
    if domain != "py" or not info["module"]:
        return None
    thing = import_module(info["module"])
    for name in info["fullname"].split("."):
        thing = getattr(thing, name, None)
    thing = inspect.unwrap(thing) if callable(thing) else thing
    try:
        lines, start = inspect.getsourcelines(thing)
        name = thing.__module__.replace(".", "/")
    except (TypeError, OSError):
        return None
    package = Path(inspect.getsourcefile(thing)).name == "__init__.py"
    file = f"src/{name}/__init__.py" if package else f"src/{name}.py"
    return f"{REPOSITORY}/blob/main/{file}#L{start}-L{start + len(lines) - 1}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything."""
    app.config.linkcode_resolve = _source_address
    app.add_directive("claims-ledger", Ledger)
    app.add_directive("chapter-status", Status)
    app.add_directive("book-contents", Contents)
    app.add_directive("data-cards", DataCards)
    app.connect("builder-inited", _chapters, priority=100)
    app.connect("autodoc-process-docstring", _myst_roles, priority=100)
    app.connect("builder-inited", chapters.number_by_name, priority=900)
    library_pages.setup(app)
    page_fixes.setup(app)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
