"""Execute the chapters under nbval, each only when something that it depends on has changed.

    python tools/execute.py [--show-differences] [--force] [NAME …]

What a chapter computed is kept in _build/executed; test and book share it. It stands as long as its key does: the
chapter itself (code and committed outputs), the modules of the library that it imports, directly or not, the stored
results that it names, the pins, and this machinery. With --show-differences a difference from the committed outputs is
shown but is no
failure: a reader's machine may differ from ours in the last digits. Errors and failed claims always are.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
EXECUTED = Path(os.environ.get("ATTNBOOK_BUILD") or ROOT / "_build") / "executed"
MACHINERY = ("requirements-lock.txt", "tools/compare.py", "tools/execute.py", "tools/nbval_chapters.py")


def module_file(name: str) -> Path | None:
    """Return the file of a module of the library, or None where there is no such module."""
    base = SOURCE.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


def imports(code: str) -> set[str]:
    """Return the modules of the library that a piece of code imports or names."""
    found: set[str] = set()
    other_names = {"attnbook"}  # that the package goes by
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            other_names |= {alias.asname for alias in node.names if alias.asname and alias.name == "attnbook"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in other_names:
            found.add(f"attnbook.{node.attr}")  # a module that the package loads when it is asked for
    return {name for name in found if name.split(".")[0] == "attnbook" and module_file(name)}


@cache
def dependencies(name: str) -> frozenset[str]:
    """Return the modules that a module imports, itself included; its packages too, and what those import by name."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if "." in module:
            todo.append(module.rsplit(".", 1)[0])
        path = module_file(module)
        text = path.read_text(encoding="utf-8")
        todo += imports(text)
        if "import_module(" in text and module != "attnbook":  # a package that loads its parts when they are asked for
            todo += [f"{module}.{part.stem}" for part in path.parent.glob("*.py") if part.stem[:2] != "__"]
    return frozenset(seen)


def code_of(notebook: nbformat.NotebookNode) -> str:
    """Return the code of a notebook as one module, without the notebook's own commands."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", text, flags=re.MULTILINE)


def key(path: Path) -> str:
    """Return what stands for everything that a chapter's outputs depend on."""
    total = hashlib.sha256()
    notebook = nbformat.read(path, 4)
    code = code_of(notebook)
    modules = sorted(set().union(*(dependencies(name) for name in imports(code)), set()))
    files = [path, *(ROOT / name for name in MACHINERY), *(module_file(name) for name in modules)]
    files += [result for result in sorted((ROOT / "results").glob("*.json")) if f'"{result.stem}' in code]
    for file in files:
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    total.update(f"{platform.python_version()} {platform.machine()}".encode())
    return total.hexdigest()


def main() -> None:
    """Execute what is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--show-differences", action="store_true")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    check = subprocess.run([sys.executable, str(ROOT / "tools" / "notebooks.py"), "check"])
    if check.returncode:
        sys.exit(check.returncode)
    chosen = [ROOT / "notebooks" / f"{name}.ipynb" for name in options.names]
    chosen = chosen or sorted((ROOT / "notebooks").glob("*.ipynb"))
    EXECUTED.mkdir(parents=True, exist_ok=True)
    for path in EXECUTED.glob("*.ipynb"):  # of chapters that are no more
        if not (ROOT / "notebooks" / path.name).exists():
            path.unlink()
    keys = {path: key(path) for path in chosen}
    stale = [path for path in chosen if options.force or not _fresh(path, keys[path], options.show_differences)]
    for path in chosen:
        if path not in stale:
            print(f"= {path.stem:<24} unchanged since it was executed")
    if not stale:
        return
    for path in stale:
        (EXECUTED / f"{path.stem}.key").unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CHAPTERS_OUT": str(EXECUTED), "PYTHONPATH": path}
    environment["CHAPTERS_SHOW_DIFFERENCES"] = "1" if options.show_differences else "0"
    longest_first = sorted(stale, key=_seconds, reverse=True)
    status = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(ROOT / "tools" / "chapters.ini"), f"--rootdir={ROOT}"),
            *("-p", "nbval_chapters", "-p", "no:cacheprovider"),
            *("--nbval", "--nbval-current-env", "--nbval-cell-timeout=600"),
            *("-n", str(min(2, len(stale))), "--dist=loadfile"),
            *map(str, longest_first),
        ],
        cwd=ROOT,
        env=environment,
    ).returncode
    summary = json.loads((EXECUTED / "summary.json").read_text())["chapters"] if not status else {}
    for path in stale:
        chapter = summary.get(path.stem, {})
        if chapter.get("passed"):
            record = {"key": keys[path], **chapter}
            (EXECUTED / f"{path.stem}.key").write_text(json.dumps(record))
    if status or len(summary) != len(stale):
        sys.exit(status or 1)


def _fresh(path: Path, wanted: str, lenient: bool) -> bool:
    """Tell whether the executed copy stands: made under the same key, without differences unless they are allowed."""
    record, copy = EXECUTED / f"{path.stem}.key", EXECUTED / path.name
    if not record.exists() or not copy.exists():
        return False
    found = json.loads(record.read_text())
    return found["key"] == wanted and (found["same"] or lenient)


def _seconds(path: Path) -> float:
    """Return the processor time that a chapter's colophon gives, so that the longest is started first."""
    match = re.search(r'"cpu_seconds": ([\d.]+)', path.read_text(encoding="utf-8"))
    return float(match.group(1)) if match else 0.0


if __name__ == "__main__":
    main()
