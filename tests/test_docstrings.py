"""Docstrings: everything public has one, and what it documents is what there is."""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

import pytest

from helpers import ROOT, SOURCE, bibliography

MODULES = sorted(SOURCE.rglob("*.py"))
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Cost", "Yields")


class Thing(NamedTuple):
    """A public definition: where it is, what it is, and the names that its docstring should explain."""

    where: str
    node: ast.AST
    names: tuple[str, ...]
    kind: str  # "function", "method", "class" or "record"


def parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    """Return a function's parameters, without self and cls."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    every += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
    return tuple(argument.arg for argument in every if argument.arg not in ("self", "cls"))


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id in ("property", "cached_property") for d in node.decorator_list)


def is_record(node: ast.ClassDef) -> bool:
    names = [ast.unparse(base) for base in node.bases] + [ast.unparse(d) for d in node.decorator_list]
    return any(name.split("(")[0] in ("NamedTuple", "dataclass") for name in names)


def is_shown(node: ast.ClassDef) -> bool:
    """Tell whether a class is what some function shows in a notebook, not for readers to make."""
    return any(isinstance(part, ast.FunctionDef) and part.name == "_repr_mimebundle_" for part in node.body)


def fields(node: ast.ClassDef) -> tuple[str, ...]:
    every = [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    return tuple(name for name in every if not name.startswith("_"))


def public_things() -> list[Thing]:
    found = []
    for path in MODULES:
        module = path.relative_to(SOURCE).as_posix()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.startswith("_"):
                continue
            if isinstance(node, ast.FunctionDef):
                found.append(Thing(f"{module}:{node.name}", node, parameters(node), "function"))
            elif isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                constructor = next((part for part in methods if part.name == "__init__"), None)
                names = fields(node) if is_record(node) else parameters(constructor) if constructor else ()
                kind = "record" if is_record(node) else "class"
                found.append(Thing(f"{module}:{node.name}", node, names, kind))
                for part in methods:
                    if not part.name.startswith("_"):
                        where = f"{module}:{node.name}.{part.name}"
                        found.append(Thing(where, part, () if is_property(part) else parameters(part), "method"))
    return found


THINGS = public_things()


def section(doc: str, title: str) -> list[str] | None:
    """Return the names that a section explains, or None where there is no such section."""
    lines = doc.splitlines()
    starts = [i for i, line in enumerate(lines) if line == f"{title}:"]
    if not starts:
        return None
    names = []
    for line in lines[starts[0] + 1 :]:
        if line and not line.startswith(" "):
            break
        if match := re.match(r" {4}(\w+): \S", line):
            names.append(match.group(1))
        elif not re.match(r" {8}\S|$", line):
            names.append(f"not an entry: {line}")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_modules_say_what_they_are(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc
    assert doc.splitlines()[0].endswith((".", ":", "?"))


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.where)
def test_public_things_are_documented(thing):
    doc = ast.get_docstring(thing.node)
    assert doc, "no docstring"
    assert re.search(r"[.:]( |$)", doc.splitlines()[0] + " "), "the first line is a sentence"
    arguments, attributes = section(doc, "Args"), section(doc, "Attributes")
    if thing.kind == "function":
        assert arguments is not None or not thing.names, f"no Args for {thing.names}"
    if thing.kind == "class" and thing.names and not is_shown(thing.node):
        assert arguments is not None or attributes is not None, f"neither Args nor Attributes for {thing.names}"
    if thing.kind == "record":
        assert arguments is None, "a record has Attributes"
        assert attributes is None or attributes == list(thing.names)
    elif arguments is not None:
        assert arguments == list(thing.names)
    for title in re.findall(r"^(\w+):$", doc, re.MULTILINE):
        assert title in SECTIONS, f"unknown section {title}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_citations_are_in_the_bibliography(path):
    text = path.read_text(encoding="utf-8")
    cited = {key for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in re.split(r"\s*,\s*", keys)}
    assert cited <= bibliography()
    assert text.count("{cite") == len(re.findall(r"\{cite(?::\w+)?\}`[^`]+`", text)), "a citation is broken off"


def test_the_bibliography_can_be_read_and_each_entry_says_who_and_what():
    from pybtex.database import parse_file

    entries = parse_file(ROOT / "book" / "references.bib").entries
    assert set(entries) == bibliography()
    for key, entry in entries.items():
        assert entry.persons or "author" in entry.fields, key
        assert "title" in entry.fields, key
