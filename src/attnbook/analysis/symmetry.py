"""Symmetries of a language: renaming the verbs of SCAN, and models that commute with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations

from attnbook.data.scan import PRIMITIVES
from attnbook.shapes import mismatch

Words = tuple[str, ...]
Renaming = Mapping[str, str]
Predict = Callable[[Sequence[Words]], Sequence[Sequence[str]]]


def check_renaming(renaming: Renaming) -> Renaming:
    """Return a renaming if it permutes SCAN's verbs.

    Args:
        renaming: from each of the four verbs to another, or the same.
    Raises:
        ValueError: it is no permutation of them.
    """
    if set(renaming) != set(PRIMITIVES) or set(renaming.values()) != set(PRIMITIVES):
        raise mismatch("renaming", f"a permutation of {', '.join(PRIMITIVES)}", dict(renaming))
    return renaming


def renamings() -> list[Renaming]:
    """Return the symmetric group of the four verbs: all 24 renamings, the identity first."""
    return [dict(zip(PRIMITIVES, order, strict=True)) for order in permutations(PRIMITIVES)]


def inverse(renaming: Renaming) -> Renaming:
    """Return the renaming that undoes another.

    Args:
        renaming: a permutation of the verbs.
    """
    return {new: old for old, new in check_renaming(renaming).items()}


def act(renaming: Renaming, words: Iterable[str]) -> Words:
    """Rename the verbs of a command and the actions that belong to them; leave every other word alone.

    Args:
        renaming: from verb to verb.
        words: of a command, of its actions, or of both.
    """
    table = dict(check_renaming(renaming))
    table |= {PRIMITIVES[old]: PRIMITIVES[new] for old, new in renaming.items()}
    return tuple(table.get(word, word) for word in words)


def canonical(command: Iterable[str]) -> Renaming:
    """Return the renaming after which a command's verbs appear in the order walk, look, run, jump.

    The verbs that it does not name follow in their usual order.

    Args:
        command: words.
    """
    found = list(dict.fromkeys(word for word in command if word in PRIMITIVES))
    order = found + [verb for verb in PRIMITIVES if verb not in found]
    return dict(zip(order, PRIMITIVES, strict=True))


def symmetrise(predict: Predict) -> Predict:
    """Make any predictor commute with every renaming of the verbs.

    It renames each command canonically, predicts, leaves out the actions of verbs that the command does not name, and
    renames back ({cite}`gordon2020` build the same property into the layers instead).

    Args:
        predict: maps commands to their actions.
    Returns:
        A function of the same kind, f, with f(g · x) = g · f(x) for each renaming g and command x.
    """

    def symmetric(commands: Sequence[Words]) -> list[Words]:
        to = [canonical(command) for command in commands]
        renamed = [act(renaming, command) for renaming, command in zip(to, commands, strict=True)]
        results = []
        for renaming, command, actions in zip(to, renamed, predict(renamed), strict=True):
            foreign = {action for verb, action in PRIMITIVES.items() if verb not in command}
            results.append(act(inverse(renaming), (action for action in actions if action not in foreign)))
        return results

    return symmetric
