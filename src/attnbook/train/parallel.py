"""Many processes: joining them, and dividing batches, states and matrices among them.

What is here takes a model and a process group or mesh, and gives back a model that is trained as before; :func:`divide`
and :func:`take_part` combine all of it. Ring attention is in :mod:`attnbook.train.ring`, sharded checkpoints are in
:mod:`attnbook.train.sharded`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attnbook.layers import TransformerBlock
from attnbook.models.decoder import Decoder
from attnbook.shapes import check_count, mismatch
from attnbook.train.ring import ContextParallel, take_slice

AXES = ("data", "context", "tensor")


class Place(NamedTuple):
    """Where a process stands among the others.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: what it computes on.
    """

    rank: int
    size: int
    device: torch.device


@contextmanager
def process_group(*, timeout: float = 600.0) -> Iterator[Place]:
    """Join the processes that ``torchrun`` started, and part at the end; a process started alone is a group of one.

    GPUs talk by NCCL, each process with the one of its local rank; processors by Gloo. A group that exists already is
    used, and left.

    Args:
        timeout: seconds after which a process that waits for another gives up.
    Yields:
        This process's place.
    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise mismatch("nproc_per_node", f"at most {torch.cuda.device_count()}, the number of GPUs", f"{local + 1}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Place(dist.get_rank(), dist.get_world_size(), device)
        return
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **alone)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def make_mesh(*, tensor: int = 1, context: int = 1, device_type: str | None = None) -> Any:
    """Arrange the processes in a box with the axes "data", "context" and "tensor"; neighbours share a tensor.

    Args:
        tensor: processes that share each matrix.
        context: processes that share each sequence.
        device_type: "cpu" or "cuda"; that of the machine by default.
    Returns:
        A ``DeviceMesh``; ``mesh["tensor"]`` is one axis of it, ``mesh["tensor"].get_group()`` its group. What is left
        of the processes makes the axis "data".
    Raises:
        ValueError: sizes below 1, or that do not divide the number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    shared = check_count("tensor", tensor) * check_count("context", context)
    if size % shared:
        raise mismatch("tensor × context", f"a divisor of the {size} processes", shared)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    return init_device_mesh(device_type, (size // shared, context, tensor), mesh_dim_names=AXES)


def take_rows(batch: Any, *, group: dist.ProcessGroup | None = None) -> Any:
    """Cut this process's rows out of each tensor of a batch: equally many for each, so that means of means are means.

    Args:
        batch: a tensor (B, …), or a nest of them.
        group: the processes that share a batch; all of them by default.
    Returns:
        The same nest, of tensors (B / P, …).
    Raises:
        ValueError: a batch that the number of processes does not divide.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def cut(x: Tensor) -> Tensor:
        if len(x) % size:
            raise mismatch("batch", f"a multiple of {size} rows, one part for each process", x)
        return x.chunk(size)[rank]

    return tree_map(cut, batch)


def average(value: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Average a number over the processes: the loss to report. One that is NaN anywhere is NaN everywhere.

    Args:
        value: of any shape; it is not changed.
        group: all processes by default.
    """
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def data_parallel(model: nn.Module, *, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Give each process the whole model and a part of the batch; gradients are averaged during the backward pass.

    Args:
        model: with the same shape everywhere; the weights of the first process are copied to the others.
        group: all processes by default.
    Returns:
        The model in PyTorch's ``DistributedDataParallel``; the model itself is its attribute ``module``.
    """
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, process_group=group)


def shard(model: nn.Module, mesh: Any, *, reshard: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """Give each process a part of every weight, gradient and optimiser state, and a part of the batch (FSDP2).

    A block's weights are gathered when it is needed and let go afterwards. Make the optimiser after this: the
    parameters are new tensors.

    Args:
        model: changed in place; its :class:`attnbook.layers.TransformerBlock` are units of their own, the rest is one.
        mesh: of one axis.
        reshard: let a block's gathered weights go after the forward pass, and gather them again for the backward pass.
        dtype: compute and gather in this type; gradients are summed in float32.
    Returns:
        The same model.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": mesh}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            fully_shard(module, reshard_after_forward=reshard, **options)
    return fully_shard(model, reshard_after_forward=reshard, **options)


def sharding_plugin(*, reshard: bool = True) -> Any:
    """Return Accelerate's setting for what :func:`shard` does: ``Accelerator(fsdp_plugin=sharding_plugin())``.

    Accelerate shards on accelerators only; on processors use :func:`shard`.

    Args:
        reshard: as for :func:`shard`.
    """
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=reshard,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[TransformerBlock.__name__],
        state_dict_type="SHARDED_STATE_DICT",
    )


def tensor_parallel(model: Decoder, mesh: Any) -> Decoder:
    """Give each process some heads and some hidden units of every block, and some rows of the vocabulary.

    The first matrix of each part is divided by columns and the second by rows, so that a block communicates twice
    forward and twice backward ({cite}`shoeybi2019`, §3). Norms and position tables are whole everywhere. All processes
    take the same batch. Make the optimiser after this, from :func:`split_groups`.

    Args:
        model: changed in place; the weights of the first process count.
        mesh: of one axis.
    Returns:
        The same model; its matrices are ``DTensor``. It trains; its caches are for whole models.
    Raises:
        ValueError: no :class:`attnbook.models.decoder.Decoder`; heads, key–value heads or hidden units that the number
            of processes does not divide; dropout, which would differ from a single process's.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if not isinstance(model, Decoder):
        raise mismatch("model", "a Decoder", model)
    size = mesh.size()
    for block in model.blocks:
        attention, hidden = block.attention, block.feed_forward.up.out_features
        counts = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads, "hidden": hidden}
        for name, count in counts.items():
            if count % size:
                raise mismatch(name, f"a multiple of the {size} processes that share a matrix", count)
        if attention.dropout:
            raise mismatch("dropout", "0 of the attention weights", f"{attention.dropout}")
        plan = {f"attention.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {"attention.out_proj": RowwiseParallel()}
        plan |= {
            f"feed_forward.{name}": ColwiseParallel() for name in ("up", "gate") if hasattr(block.feed_forward, name)
        }
        plan |= {"feed_forward.down": RowwiseParallel()}
        if block.feed_forward.gate is None:
            del plan["feed_forward.gate"]
        parallelize_module(block, mesh, plan)
    tied = model.output.weight is model.embedding.weight
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    if tied:  # both were cut by rows of the vocabulary: again one matrix
        model.output.weight = model.embedding.weight
    group = mesh.get_group()
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)
    return model


def divide(model: Decoder, mesh: Any, *, order: str = "zigzag", **options: Any) -> nn.Module:
    """Divide a decoder over all axes of a mesh: matrices over "tensor", sequences over "context", states over the rest.

    Each process gets its part of a batch from :func:`take_part`, and the mean of all their losses is the loss.

    Args:
        model: changed in place; with the same weights everywhere.
        mesh: from :func:`make_mesh`.
        order: as for :func:`attnbook.train.ring.slice_positions`.
        options: passed on to :func:`shard`.
    Returns:
        The model to call. Make the optimiser after this, from :func:`split_groups`.
    Raises:
        ValueError: as for :func:`tensor_parallel` and :class:`attnbook.train.ring.ContextParallel`.
    """
    if mesh["tensor"].size() > 1:
        tensor_parallel(model, mesh["tensor"])
    if mesh["context"].size() > 1:
        model = ContextParallel(model, mesh["context"].get_group(), order)
    return shard(model, mesh["data", "context"]._flatten("replica"), **options)


def take_part(batch: Any, mesh: Any, *, order: str = "zigzag") -> Any:
    """Cut this process's part out of each tensor of a batch: its rows, and its slice of their length.

    Args:
        batch: a tensor (B, L, …), or a nest of them; the same on every process.
        mesh: from :func:`make_mesh`.
        order: as for :func:`divide`.
    Returns:
        The same nest, of tensors (B / data, L / context, …).
    Raises:
        ValueError: sizes that the mesh does not divide.
    """
    batch = take_rows(batch, group=mesh["data"].get_group())
    if mesh["context"].size() == 1:
        return batch
    return take_slice(batch, group=mesh["context"].get_group(), order=order)


def split_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide an optimiser's groups so that each holds tensors of one kind: whole, or cut over one mesh.

    PyTorch's fused and batched optimisers take no mixture.

    Args:
        groups: as for an optimiser, from ``parameter_groups`` say.
    Returns:
        Groups with the same options, none empty.
    """
    divided = []
    for group in groups:
        kinds: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        divided += [{**group, "params": parameters} for parameters in kinds.values()]
    return divided


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale the gradients so that their joint norm is at most a given one, however they are divided.

    Args:
        parameters: whole or cut; each process calls this.
        most: the largest norm.
    Returns:
        The norm before, the same on every process.
    Raises:
        ValueError: a norm that is not positive.
    """
    if not most > 0:
        raise mismatch("most", "a number > 0", most)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())
    factor = (most / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        local.mul_(factor)
    return total
