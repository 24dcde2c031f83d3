"""Measurement: time as ratios, memory as the allocator counts it, arithmetic by formula.

Timings are noisy and machines differ, so times are compared within one process, in turns, by their ratio.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from attnbook.shapes import check_choice, check_count, mismatch
from attnbook.train.throughput import matmul_rate as matmul_rate
from attnbook.train.throughput import mfu as mfu
from attnbook.train.throughput import training_flops as training_flops

SHORT = 0.05  # seconds


class Ratio(NamedTuple):
    """How long one thing takes relative to another.

    Attributes:
        median: of the rounds' ratios.
        low: their lower quartile.
        high: their upper quartile.
    """

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time several functions in turns, so that whatever disturbs the machine disturbs them alike.

    Every other round goes backwards. A function that takes less than 50 ms is called once, untimed, right before each
    of its turns: otherwise it pays for the caches and the memory that the one before it left behind.

    Args:
        functions: what to time, by name; each is called once beforehand, untimed.
        rounds: how often each is timed.
        clock: seconds; pass ``time.process_time`` on a busy machine.
    Returns:
        The times of each, in seconds, one for each round.
    Raises:
        ValueError: nothing to time, rounds below 1.
    """
    check_count("rounds", rounds)
    if not functions:
        raise mismatch("functions", "at least one", "none")
    lasted = {}  # the latest call of each, by the wall's clock: a first one may load or compile something
    for name, function in functions.items():
        began = time.perf_counter()
        function()
        lasted[name] = time.perf_counter() - began
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name, function in list(functions.items())[:: -1 if turn % 2 else 1]:
            if lasted[name] < SHORT:
                function()
            began, started = time.perf_counter(), clock()
            function()
            times[name].append(clock() - started)
            lasted[name] = time.perf_counter() - began
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> Ratio:
    """Compare two rows of :func:`interleaved`, round by round.

    Args:
        times: what it returned.
        name: the numerator.
        to: the denominator.
    Returns:
        Median and quartiles of the ratios.
    Raises:
        ValueError: a name that was not timed.
    """
    for argument, value in (("name", name), ("to", to)):
        if value not in times:
            raise mismatch(argument, "one of " + ", ".join(map(repr, times)), repr(value))
    ratios = sorted(a / b for a, b in zip(times[name], times[to], strict=True))
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def peak_memory(function: Callable[[], Any], *, device: str = "cpu") -> int:
    """Return the most memory that PyTorch's allocator holds while a function runs, beyond what it held before.

    On the processor it is counted from the profiler's record of every allocation, on a GPU by the allocator itself, so
    the figure is the same on every run; what libraries allocate by other means is not seen. The function is called once
    beforehand, to let caches fill.

    Args:
        function: what to measure.
        device: whose memory, "cpu" or "cuda".
    Returns:
        Bytes.
    Raises:
        ValueError: another device.
    """
    if check_choice("device", device, ("cpu", "cuda")) == "cuda":
        import torch

        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's backend chats on stderr otherwise
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def count_flops(function: Callable[[], Any]) -> int:
    """Count the floating-point operations of the matrix products in a call, a multiplication and an addition as two.

    Args:
        function: what to measure.
    Returns:
        Operations, as PyTorch's ``FlopCounterMode`` counts them, products in place and the processor's fused attention
        included, which it passes over, and a sparse matrix only where it has entries. Inside fused attention all pairs
        count, causal or not.
    """
    import torch
    from torch.utils import flop_counter

    aten = torch.ops.aten
    formulas = {
        aten.addmm_: flop_counter.addmm_flop,
        aten.baddbmm_: flop_counter.baddbmm_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
    }
    more = {operation: formula.__wrapped__ for operation, formula in formulas.items()}

    def product(a: Any, b: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
        if a.layout == torch.strided:
            return flop_counter.mm_flop.__wrapped__(a.shape, b.shape)
        return 2 * a._nnz() * b.shape[1]  # PyTorch's own formula takes the sparse matrix for a full one

    product._get_raw = True  # the counter hands such a formula the tensors, not their shapes
    more[aten.mm] = product
    with flop_counter.FlopCounterMode(display=False, custom_mapping=more) as counter:
        function()
    return counter.get_total_flops()


def count_bytes(function: Callable[[], Any]) -> int:
    """Count the bytes that a call moves if nothing stays in a cache from one operation to the next.

    Every operation that PyTorch's dispatcher sees reads its inputs once and writes its output once; views move nothing,
    and neither does room that is only reserved. An operation in place reads and writes. What one fused operation moves
    inside counts as nothing, so for a fused kernel this is the least that it has to move.

    Args:
        function: what to measure.
    Returns:
        Bytes.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            read = {(t.data_ptr(), t.shape, t.stride()): t for t in _tensors((args, kwargs or {}))}
            places = {_place(t) for t in read.values()}
            changes = operation._schema.is_mutable
            written = [t for t in _tensors(result) if changes or _place(t) not in places]
            if written and "empty" not in operation.name():
                self.moved += sum(map(_size, [*read.values(), *written]))
            return result

    with Counter() as counter:
        function()
    return counter.moved


def saved_bytes(function: Callable[[], Any], *, besides: Iterable[Any] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of a call; storages shared by tensors count once.

    Args:
        function: runs forward, with gradients wanted; its result is dropped.
        besides: tensors that exist anyway, the parameters say, and do not count.
    Returns:
        Bytes.
    """
    import torch

    known = {_place(tensor) for tensor in besides}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if _place(tensor) not in known:
            kept[_place(tensor)] = tensor  # held until the end, so that no place is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _tensors(found: Any) -> Iterator[Any]:
    if hasattr(found, "untyped_storage"):
        yield found
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _tensors(each)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))


def _place(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr()


def _size(tensor: Any) -> int:
    """Return a tensor's bytes; what is repeated by a stride of 0 counts once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def attention_flops(
    L: int,
    S: int,
    D: int,
    *,
    Dv: int | None = None,
    heads: int = 1,
    batch_size: int = 1,
    is_causal: bool = False,
    backward: bool = False,
) -> int:
    """Return the operations of the matrix products of attention, by formula.

    Forward 2·L·S·(D + Dv) a head. Backward, from stored weights, twice that: each product has two gradients. Causal
    attention needs only the pairs on and below the diagonal, ends aligned.

    Args:
        L: queries.
        S: keys.
        D: size of a query and key head.
        Dv: size of a value head; D by default.
        heads: H.
        batch_size: B.
        is_causal: count the allowed pairs only.
        backward: count forward and backward.
    Returns:
        Operations.
    Raises:
        ValueError: a size below 1.
    """
    for name, size in (("L", L), ("S", S), ("D", D), ("heads", heads), ("batch_size", batch_size)):
        check_count(name, size)
    Dv = D if Dv is None else check_count("Dv", Dv)
    pairs = sum(min(max(i + S - L + 1, 0), S) for i in range(L)) if is_causal else L * S
    return 2 * pairs * (D + Dv) * heads * batch_size * (3 if backward else 1)
