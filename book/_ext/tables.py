"""What several directives make: tables, and text to be parsed."""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList


def table(header: list[str], rows: list[list[str]], classes: str, label: str) -> nodes.raw:
    """Build a table; cells are HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    markup = f'<div class="table-scroll" tabindex="0" role="region" aria-label="{label}"><table class="{classes}">'
    return nodes.raw("", f"{markup}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>", format="html")


def lines_of(text: list[str], source: str) -> StringList:
    """Prepare lines, which may hold line breaks themselves, for nested parsing."""
    return StringList("\n".join(text).split("\n"), source)
