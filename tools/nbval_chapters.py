"""A pytest plugin: nbval runs the chapters; this says when outputs agree, keeps what was computed, and reports.

One line a chapter as it finishes; a failure names the chapter, the cell and the difference. What a chapter printed and
drew goes to the folder named by CHAPTERS_OUT: the book is built from exactly that.
"""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import nbformat
import pytest

from compare import compare

OUT = "CHAPTERS_OUT"
LENIENT = os.environ.get("CHAPTERS_SHOW_DIFFERENCES") == "1"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def _title(cell: Any) -> str:
    """Return the first line of a cell that says something."""
    lines = [line.strip() for line in cell.source.splitlines()]
    return next((line for line in lines if line and not line.startswith(("#", "%", "import ", "from "))), "")[:70]


def _compare_outputs(self: Any, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    result = compare(ref, test)
    self.counts = {"compared": result.compared, "judged": result.judged}
    self.comparison_traceback = result.differences
    if result.differences and LENIENT:
        self.counts["differences"] = result.differences
        return True
    return not result.differences


def _failure(self: Any, excinfo: Any) -> str:
    text = str(getattr(excinfo.value, "inner_traceback", "") or excinfo.value)
    lines = ANSI.sub("", text).strip().split("\n")
    if len(lines) > 30 and "differ" not in str(excinfo.value):  # a traceback: its end says what happened
        lines = ["…", *lines[-12:]]
    return f"cell {self.cell_num + 1} ({_title(self.cell)}): {excinfo.value}\n  " + "\n  ".join(lines)


def pytest_configure(config: Any) -> None:
    """Put our comparison in the place of nbval's, which knows no tolerance."""
    from nbval.plugin import IPyNbCell

    IPyNbCell.compare_outputs = _compare_outputs
    IPyNbCell.repr_failure = _failure
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(), "chapters-progress")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Refuse chapters that were committed without being executed: nbval would pass them unchecked."""
    for item in items:
        if item.cell.execution_count is None:
            raise pytest.UsageError(f"{item.path.name}: cell {item.cell_num + 1} was committed without being executed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Attach the counts of a cell to its report, which travels from the worker to the one that prints."""
    report = yield
    if call.when == "call":
        ignored = not item.options["check"]
        counts = getattr(item, "counts", {})
        outputs = len(item.test_outputs or []) if ignored else 0
        report.user_properties.append(("cell", {"title": _title(item.cell), "left_out": outputs, **counts}))
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: Any, nextitem: Any) -> None:
    """After a chapter's last cell, keep the executed copy."""
    out = os.environ.get(OUT)
    if not out or (nextitem is not None and nextitem.parent is item.parent):
        return
    notebook = copy.deepcopy(item.parent.nb)
    ran = [other for other in item.session.items if other.parent is item.parent]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if len(ran) != len(code) or any(other.test_outputs is None for other in ran):
        return
    for number, (other, cell) in enumerate(zip(ran, code, strict=True), 1):
        cell.execution_count = number
        cell.outputs = [nbformat.from_dict(output) for output in other.test_outputs]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    Path(out).mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, Path(out) / item.path.name)


class Progress:
    """Print a line for each chapter, and a sum at the end; leave a summary for whoever called."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.cells: dict[str, list[Any]] = defaultdict(list)
        self.totals: dict[str, int] = {}
        self.begun = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: Any) -> None:
        """Silence pytest's own lines: ours take their place."""
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        terminal._tw._file = open(os.devnull, "w")  # noqa: SIM115

    def pytest_collectreport(self, report: Any) -> None:
        """Show what could not be read."""
        if report.failed:
            print(report.longrepr, flush=True)

    def pytest_internalerror(self, excrepr: Any) -> None:
        """Show an error of pytest itself, or of this plugin."""
        print(excrepr, flush=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Collect the cells of a chapter; report when the last has come."""
        if report.when == "setup" and report.passed:
            self.started.setdefault(report.fspath, time.monotonic())
        if report.when != "call" and report.passed:
            return
        cells = self.cells[report.fspath]
        cells.append(report)
        if report.fspath not in self.totals:
            notebook = nbformat.read(report.fspath, 4)
            self.totals[report.fspath] = sum(cell.cell_type == "code" for cell in notebook.cells)
        if len(cells) == self.totals[report.fspath]:
            self._say(report.fspath)

    def _sum(self, reports: list[Any], key: str) -> int:
        return sum(dict(report.user_properties).get("cell", {}).get(key, 0) for report in reports)

    def _say(self, path: str) -> None:
        reports = self.cells[path]
        failed = [report for report in reports if report.failed]
        seconds = time.monotonic() - self.started.get(path, self.begun)
        compared, judged = self._sum(reports, "compared"), self._sum(reports, "judged")
        print(
            f"{'✗' if failed else '✓'} {Path(path).stem:<24} {len(reports):>3} cells, {compared:>3} outputs compared, "
            f"{judged:>2} claims held, {seconds:>4.0f} s",
            flush=True,
        )
        for report in failed[:1]:
            print(f"  {Path(path).stem}, {report.longrepr}", flush=True)
            if len(failed) > 1:
                print(f"  … and {len(failed) - 1} later cells", flush=True)
        for report in reports:
            for difference in dict(report.user_properties).get("cell", {}).get("differences", []):
                print(f"  differs here: {difference}", flush=True)

    def pytest_sessionfinish(self) -> None:
        """Print the sum, and write the summary."""
        every = [report for reports in self.cells.values() for report in reports]
        summary = {
            "chapters": {
                Path(path).stem: {
                    "passed": not any(report.failed for report in reports) and len(reports) == self.totals[path],
                    "same": not self._has_differences(reports),
                    "cells": len(reports),
                    "compared": self._sum(reports, "compared"),
                    "judged": self._sum(reports, "judged"),
                    "left_out": self._sum(reports, "left_out"),
                }
                for path, reports in self.cells.items()
            }
        }
        if every:
            print(
                f"  {len(self.cells)} chapters executed, {len(every)} cells: {self._sum(every, 'compared')} outputs "
                f"compared, {self._sum(every, 'judged')} claims held, {self._sum(every, 'left_out')} outputs left out "
                f"by tag, {time.monotonic() - self.begun:.0f} s"
            )
        if os.environ.get(OUT):
            Path(os.environ[OUT]).mkdir(parents=True, exist_ok=True)
            Path(os.environ[OUT], "summary.json").write_text(json.dumps(summary, indent=1))

    def _has_differences(self, reports: list[Any]) -> bool:
        return any("differences" in dict(report.user_properties).get("cell", {}) for report in reports)
