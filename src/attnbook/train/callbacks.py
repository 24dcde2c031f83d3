"""What is told of a run while it goes on: metrics in files, progress on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from attnbook.shapes import check_count, mismatch


class Record(NamedTuple):
    """One step.

    Attributes:
        step: steps taken, this one included.
        loss: its training loss.
        learning_rate: of the first group.
        gradient_norm: before clipping; None where nothing is clipped.
        tokens: how many the step saw: elements of the targets, or of what else comes last in a batch.
        seconds: of training so far, evaluations left out.
        evaluation: what ``evaluate`` returned, where it was due.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float | None
    tokens: int
    seconds: float
    evaluation: Any = None


class Callback:
    """What :func:`attnbook.train.fit` tells of a run; every method may be left as it is."""

    def start(self, first: int, steps: int) -> None:
        """Hear that a run begins.

        Args:
            first: steps taken already, 0 but for a run that resumes.
            steps: how many there will be.
        """

    def record(self, record: Record) -> None:
        """Hear of a step.

        Args:
            record: what happened.
        """

    def stop(self) -> None:
        """Hear that the run is over, or has failed."""


class JSONLines(Callback):
    """Metrics, one JSON object a line; a run that resumes first drops the lines of steps that it will take again.

    Args:
        path: of the file.
        every: steps between lines; evaluations are written whenever they come.
    """

    def __init__(self, path: str | Path, *, every: int = 1):
        self.path, self.every = Path(path), check_count("every", every)
        self._file: TextIO | None = None

    def start(self, first: int, steps: int) -> None:
        """Open the file."""
        kept = []
        if first and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] <= first:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):  # the line that a kill broke off
                    break
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def record(self, record: Record) -> None:
        """Write a line."""
        if self._file and (record.step % self.every == 0 or record.evaluation is not None):
            told = {name: value for name, value in record._asdict().items() if value is not None}
            self._file.write(json.dumps(told, default=str) + "\n")

    def stop(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


class TensorBoard(Callback):
    """Metrics for TensorBoard, where it is installed.

    Args:
        folder: of the event files.
    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise mismatch("tensorboard", "False, or the package installed", "no package tensorboard") from None
        self._writer = SummaryWriter(str(folder))

    def record(self, record: Record) -> None:
        """Write the step's numbers."""
        values = {"loss": record.loss, "learning rate": record.learning_rate, "gradient norm": record.gradient_norm}
        if isinstance(record.evaluation, (int, float)):
            values["evaluation"] = record.evaluation
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def stop(self) -> None:
        """Close the file."""
        self._writer.close()


class Progress(Callback):
    """A line on the terminal: steps, loss, tokens a second, the rest of the time.

    Quiet under continuous integration (``$CI`` is set) and where the output is no terminal.

    Args:
        flops: operations of a token, forward and backward; with ``peak``, the model's share of the peak is shown.
        peak: operations that the device can do in a second.
        show: whether to show anything; by default as said above.
        file: where to; standard error by default.
    """

    def __init__(
        self,
        *,
        flops: float | None = None,
        peak: float | None = None,
        show: bool | None = None,
        file: TextIO | None = None,
    ):
        self.flops, self.peak, self.file = flops, peak, file or sys.stderr
        self.show = (self.file.isatty() and not os.environ.get("CI")) if show is None else show
        self._bar = self._task = None
        self._tokens, self._seconds, self._drawn = 0, 0.0, 0.0

    def start(self, first: int, steps: int) -> None:
        """Draw the line."""
        if not self.show:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(file=self.file, force_terminal=True), auto_refresh=False)
        self._task = self._bar.add_task("", total=steps, completed=first)
        self._bar.start()

    def record(self, record: Record) -> None:
        """Draw anew, ten times a second at most."""
        if self._bar is None:
            return
        self._tokens += record.tokens
        now = time.monotonic()
        if now - self._drawn < 0.1 and record.step < self._bar.tasks[0].total:
            return
        elapsed = record.seconds - self._seconds  # since the last drawing
        rate = self._tokens / elapsed if elapsed > 0 else 0.0
        share = f" · {rate * self.flops / self.peak:.1%} of peak" if self.flops and self.peak else ""
        words = f"loss {record.loss:.4f} · {rate:,.0f} tokens/s{share}"
        self._bar.update(self._task, completed=record.step, description=words, refresh=True)
        self._tokens, self._seconds, self._drawn = 0, record.seconds, now

    def stop(self) -> None:
        """Leave the line as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
