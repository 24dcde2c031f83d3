"""Checkpoints that survive a kill, a full disk and a damaged file.

A checkpoint is a folder ``step-00000100`` that appears all at once: it is written under another name, every file is
flushed to the disk, the folder is renamed, and the rename is flushed too. It holds::

    weights.safetensors     the model's parameters and buffers
    state.safetensors       the other tensors: of the optimiser, the averages, the generators, the losses
    state.json              everything else: step, data position, digest of the configuration, numbers
    SHA256SUMS              of these three; `sha256sum -c SHA256SUMS` checks them by hand

Nothing is unpickled: reading one runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attnbook.shapes import check_count, describe, mismatch

WEIGHTS, TENSORS, FACTS, SUMS = "weights.safetensors", "state.safetensors", "state.json", "SHA256SUMS"
FORMAT = "attnbook checkpoint 1"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it, and says what is still good."""


class CheckpointWarning(UserWarning):
    """A checkpoint was refused, and an earlier one used."""


class Checkpoint(NamedTuple):
    """What was stored.

    Attributes:
        step: steps taken.
        weights: the model's tensors by name.
        state: the rest, as it was given to :meth:`Checkpoints.save`.
        path: its folder.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """A folder of checkpoints, the newest few of which are kept.

    Args:
        folder: made when the first is saved.
        keep: how many to keep.
        digest: of the configuration; a checkpoint of another is refused.
    Raises:
        ValueError: fewer than one to keep.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3, digest: str = ""):
        self.folder, self.keep, self.digest = Path(folder), check_count("keep", keep), digest

    def steps(self) -> list[int]:
        """Return the steps of which there are checkpoints, in order; they have not been checked."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of one checkpoint.

        Args:
            step: steps taken.
        """
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove those beyond the newest few.

        Args:
            step: steps taken.
            weights: the model's tensors by name, none twice.
            state: numbers, strings, None, tensors, and lists, tuples and dictionaries of them.
        Returns:
            Its folder.
        Raises:
            CheckpointError: the disk is full, say; the earlier checkpoints are as they were.
            ValueError: something in the state that cannot be stored.
        """
        from safetensors.torch import save as to_bytes

        tensors: dict[str, Tensor] = {}
        facts = {"format": FORMAT, "step": step, "digest": self.digest, "state": _pack(state, tensors, "state")}
        target, partial = self.path(step), self.folder / f".partial-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".partial-*"):  # of a process that was killed
                shutil.rmtree(left)
            partial.mkdir()
            sums = []
            for name, content in (
                (WEIGHTS, lambda: to_bytes(_plain(weights))),
                (TENSORS, lambda: to_bytes(_plain(tensors))),
                (FACTS, lambda: json.dumps(facts).encode()),
            ):
                written = content()
                sums.append(f"{hashlib.sha256(written).hexdigest()}  {name}\n")
                _write(partial / name, written)
            _write(partial / SUMS, "".join(sums).encode())
            _flush(partial)
            if target.exists():  # one that was refused
                shutil.rmtree(target)
            partial.rename(target)
            _flush(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = self.steps()
            good = f"the last one there is that of step {last[-1]}" if last else "there is none yet"
            raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}); {good}") from error
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def load(self) -> Checkpoint | None:
        """Read the newest checkpoint that is good; warn of each that is refused, by name.

        Returns:
            None where there is no checkpoint at all.
        Raises:
            CheckpointError: there are some, and none is good.
        """
        refused = []
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                refused.append(str(error))
                warnings.warn(f"{error}; it is left out", CheckpointWarning, stacklevel=2)
        if refused:
            raise CheckpointError(f"{self.folder}: no checkpoint is good: " + "; ".join(refused))
        return None

    def read(self, step: int) -> Checkpoint:
        """Read one checkpoint.

        Args:
            step: steps taken.
        Raises:
            CheckpointError: it is missing, truncated, changed, not ours, or of another configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        path = self.path(step)
        try:
            listed = (path / SUMS).read_text(encoding="utf-8")
            sums = {name: digest for digest, _, name in (line.partition("  ") for line in listed.splitlines())}
            if set(sums) != {WEIGHTS, TENSORS, FACTS} or not listed.endswith("\n"):
                raise CheckpointError(f"{path / SUMS}: truncated, or not a checkpoint's")
            content = {}
            for name, digest in sums.items():
                content[name] = (path / name).read_bytes()
                if hashlib.sha256(content[name]).hexdigest() != digest:
                    raise CheckpointError(f"{path / name}: truncated or changed, its SHA-256 is not that of {SUMS}")
            facts = json.loads(content[FACTS])
            if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("step") != step:
                raise CheckpointError(f"{path / FACTS}: expected {FORMAT!r} of step {step}, got another")
            if facts["digest"] != self.digest:
                raise CheckpointError(f"{path}: of another configuration (digest {facts['digest'][:12] or 'none'})")
            return Checkpoint(
                step, from_bytes(content[WEIGHTS]), _unpack(facts["state"], from_bytes(content[TENSORS])), path
            )
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
        except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a checkpoint ({error})") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    if os.name == "nt":  # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Turn a value into what JSON can hold; its tensors go into a dictionary, by the place where they stood."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _pack(part, tensors, f"{name}.{key}")] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_pack(part, tensors, f"{name}.{i}") for i, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    raise mismatch(name, "numbers, strings, tensors, and lists, tuples and dictionaries of them", describe(value))


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`_pack`."""
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_unpack(part, tensors) for part in value["tuple"])
        return {key: _unpack(part, tensors) for key, part in value["items"]}
    return value


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and persistent buffers by name, one that has two names under the first.

    Args:
        model: any.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


@torch.no_grad()
def load_tensors(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Overwrite a model's parameters and buffers; nothing is changed unless all fit.

    Args:
        model: of the same shape.
        weights: from :func:`model_tensors`.
    Raises:
        ValueError: the names, the shapes or the types are another model's.
    """
    own = model_tensors(model)
    if own.keys() != weights.keys():
        first = sorted(own.keys() ^ weights.keys())[0]
        side = "lacks" if first in own else "has in addition"
        raise mismatch("weights", "those of this model", f"those of another, which {side} {first!r}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape or tensor.dtype != weights[name].dtype:
            raise mismatch(f"weights[{name!r}]", describe(tensor), weights[name])
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's generators."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the generators.

    Args:
        state: from :func:`random_state`.
    """
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
