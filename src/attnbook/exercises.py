"""Exercises with code: a stub that the reader completes, and a test that says whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ATTEMPT = "application/vnd.attnbook.attempt+json"


class Attempt:
    """The verdict on an answer: shown as one line, and left in the notebook's output for the book's own checks.

    Attributes:
        name: of the function that was asked for.
        passed: whether the test accepted it.
        reason: what went wrong, where it did not.
    """

    def __init__(self, name: str, passed: bool, reason: str):
        self.name, self.passed, self.reason = name, passed, reason

    def __repr__(self) -> str:
        return f"✓ {self.name} passes" if self.passed else f"✗ {self.name} is not there yet: {self.reason}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        record = {"name": self.name, "passed": self.passed}
        return {"text/plain": repr(self), ATTEMPT: record}


def attempt(test: Callable[[Callable], None], answer: Callable) -> Attempt:
    """Test an answer to an exercise.

    Args:
        test: takes the answer and raises where it is wrong.
        answer: the reader's function, still a stub or complete.
    Returns:
        The verdict. An error in the answer is a verdict too, not an error of the notebook.
    """
    name = getattr(answer, "__name__", type(answer).__name__)
    try:
        test(answer)
    except Exception as error:
        return Attempt(name, False, str(error) or type(error).__name__)
    return Attempt(name, True, "")
