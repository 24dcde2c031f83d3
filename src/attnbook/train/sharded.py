"""Sharded checkpoints: each process writes its part of model and optimiser, and any number of processes reads them.

The tensors go through ``torch.distributed.checkpoint`` into safetensors files, everything else into one JSON file;
nothing is pickled. A checkpoint is a directory that is either whole or not there: it is written under another name,
flushed to disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnbook.shapes import describe_dtype, mismatch

FORMAT = "attnbook-sharded-1"
MANIFEST = "manifest.json"


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return rank and number of the processes; (0, 1) where there is no group."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def _together(action: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Act on every process, wait for all, and return what each gave; what one complains of, all raise."""
    try:
        mine = (action(), None)
    except (OSError, ValueError) as error:
        mine = (None, error)
    size = _place(group)[1]
    every: list[Any] = [mine] * size
    if size > 1:
        dist.all_gather_object(every, mine, group=group)
    for _, error in every:
        if error is not None:
            raise error
    return [result for result, _ in every]


@contextmanager
def _alone_is_no_accident() -> Iterator[None]:
    """Quieten PyTorch's remark that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _bare(model: nn.Module) -> nn.Module:
    """Take off what wraps a model: ``torch.compile``, data parallelism, context parallelism."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Name the tensors of a model; a tied one once."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in _bare(model).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _collect(model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to store, by name, and what of the optimiser is no tensor of a parameter's shape."""
    named = _named(model)
    tensors = {f"model.{name}": tensor.detach() for name, tensor in named.items()}
    rest: dict[str, Any] = {"options": {}, "scalars": {}}
    if optimizer is None:
        return tensors, rest
    names = {id(tensor): name for name, tensor in named.items()}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise mismatch("optimizer", "parameters of the model only", "another")
            name = names[id(parameter)]
            rest["options"][name] = options
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    tensors[f"optimizer.{name}.{key}"] = value.detach()
                else:
                    rest["scalars"][f"{name}.{key}"] = value.item() if isinstance(value, Tensor) else value
    return tensors, rest


def _describe(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: [describe_dtype(tensor), list(tensor.shape)] for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    """Flush a file to disk and return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(directory: Path) -> None:
    """Make the names in a directory lasting, where the system can."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_sharded(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Any = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint together; when this returns, it is on disk and whole.

    Args:
        path: a directory that does not exist yet, on a file system that all processes share.
        model: whole, sharded or divided, wrapped or not.
        optimizer: its state and options are stored too.
        extra: anything that JSON can hold, the step say; the first process's counts.
        group: the processes that hold the model; all of them by default.
    Returns:
        The path.
    Raises:
        ValueError: the path exists, an extra that JSON cannot hold, an optimiser of another model.
        OSError: no room, no permission; nothing of that name appears.
    """
    import torch.distributed.checkpoint as dcp

    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    rank, size = _place(group)
    tensors, rest = _collect(model, optimizer)
    manifest = {"format": FORMAT, "tensors": _describe(tensors), **rest, "extra": extra}

    def begin() -> None:
        try:
            json.dumps(extra)
        except TypeError as error:
            raise mismatch("extra", "what JSON can hold", str(error)) from None
        if path.exists():
            raise mismatch("path", "a name that is not taken", f"{path}")
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)

    def finish() -> None:
        if rank == 0:
            manifest["files"] = {name: digest for part in digests for name, digest in part.items()}
            target = partial / MANIFEST
            target.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _digest(target)
            _flush(partial)
            partial.rename(path)
            _flush(path.parent)

    _together(begin, group)
    try:
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with _alone_is_no_accident():
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=size == 1)
        digests = _together(lambda: {p.name: _digest(p) for p in _share(partial, rank, size)}, group)
        _together(finish, group)
    except dcp.api.CheckpointException as error:
        raise OSError(f"{path}: {'; '.join(str(cause[0]) for cause in error.failures.values())}") from error
    return path


def _share(directory: Path, rank: int, size: int) -> list[Path]:
    """Return every ``size``-th file of a directory: what this process checks."""
    return sorted(directory.glob("*.safetensors"))[rank::size]


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a checkpoint says of itself, without its tensors.

    Args:
        path: from :func:`save_sharded`.
    Returns:
        Format, tensors (type and shape), files (SHA-256), the optimiser's options and scalars, extra.
    Raises:
        ValueError: no such checkpoint, or something else.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise mismatch("path", f"a checkpoint in the format {FORMAT}", f"{path}")
    return manifest


def load_sharded(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Read a checkpoint together, whatever number of processes wrote it and however they divided the model.

    Args:
        path: from :func:`save_sharded`.
        model: of the same shape; changed in place.
        optimizer: its state and options are read too.
        group: the processes that hold the model; all of them by default.
    Returns:
        What was passed as ``extra``.
    Raises:
        ValueError: no such checkpoint, one that is damaged, one of another model, one without an optimiser where one is
            given; nothing is changed then.
    """
    import torch.distributed.checkpoint as dcp

    path = Path(path)
    rank, size = _place(group)
    named = _named(model)

    def check() -> dict[str, Any]:
        manifest = read_manifest(path)
        present = sorted(p.name for p in path.glob("*.safetensors"))
        if present != sorted(manifest["files"]):
            raise mismatch("path", f"the files {sorted(manifest['files'])}", f"{present} in {path}")
        for file in _share(path, rank, size):
            if _digest(file) != manifest["files"][file.name]:
                raise mismatch("path", "files with the checksums that were written", f"a damaged {file}")
        for name, (dtype, shape) in _describe({f"model.{n}": t for n, t in named.items()}).items():
            if manifest["tensors"].get(name) != [dtype, shape]:
                stored = manifest["tensors"].get(name)
                came = f"{stored[0]} tensor of shape {tuple(stored[1])}" if stored else "none of that name"
                raise mismatch(name, f"{dtype} tensor of shape {tuple(shape)} in {path}", came)
        strange = {name for name in manifest["tensors"] if name.startswith("model.")} - {f"model.{n}" for n in named}
        if strange:
            raise mismatch("model", f"the tensors of {path}", f"one without {min(strange)}")
        if optimizer is not None and not manifest["options"]:
            raise mismatch("path", "a checkpoint with an optimiser", f"{path}, which has none")
        return manifest

    manifest = _together(check, group)[0]
    tensors = {f"model.{name}": tensor.detach() for name, tensor in named.items()}
    states = {} if optimizer is None else _empty_states(manifest, named, optimizer)
    for name, state in states.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if value.dim()}
    reader = dcp.HuggingFaceStorageReader(str(path))
    with _alone_is_no_accident():
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=size == 1)
    for name, state in states.items():
        optimizer.state[named[name]] = state
    for options in [] if optimizer is None else optimizer.param_groups:
        stored = manifest["options"][next(n for n, tensor in named.items() if tensor is options["params"][0])]
        options.update({k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in options})
    return manifest["extra"]


def _empty_states(manifest: dict[str, Any], named: dict[str, Tensor], optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Make room for the optimiser's state of each parameter; the scalars in it are there already."""
    names = {id(tensor): name for name, tensor in named.items()}
    states = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), "one of another model")
            if name not in manifest["options"]:
                raise mismatch("optimizer", "the parameters that the checkpoint's optimiser had", f"{name} too")
            prefix = f"optimizer.{name}."
            keys = [key.removeprefix(prefix) for key in manifest["tensors"] if _of(key, prefix)]
            states[name] = {key: torch.zeros_like(parameter, requires_grad=False) for key in keys}
            device = parameter.device if group.get("fused") or group.get("capturable") else None
            for key, value in manifest["scalars"].items():
                if _of(key, f"{name}."):
                    scalar = torch.tensor(value, dtype=torch.float32, device=device)
                    states[name][key.removeprefix(f"{name}.")] = scalar
    return states


def _of(key: str, prefix: str) -> bool:
    """Tell whether a key is a prefix and one word more."""
    return key.startswith(prefix) and "." not in key.removeprefix(prefix)
