"""Context parallelism: one sequence on many processes, attention by passing keys and values around a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from attnbook.layers import MultiHeadAttention
from attnbook.mechanisms.online_softmax import OnlineSoftmax
from attnbook.mechanisms.tiled import partial_attention, partial_gradients
from attnbook.models.decoder import Decoder
from attnbook.normalizers import resolve, softmax
from attnbook.shapes import check_attention, check_choice, check_count, check_query_and_key, check_tensor, mismatch

ORDERS = ("contiguous", "zigzag", "striped")
Piece = tuple[slice, slice, bool]  # rows of the queries, columns of the keys, whether the diagonal cuts them


def slice_positions(L: int, size: int, rank: int, order: str = "zigzag") -> Tensor:
    """Return which positions of a sequence a process holds.

    In one piece ("contiguous", {cite}`liu2024`) the process with the last positions does most of the causal work. Of 2P
    chunks, "zigzag" gives process r the chunks r and 2P − 1 − r, one early and one late; "striped"
    ({cite}`brandon2023`, §3) deals the positions out like cards.

    Args:
        L: length of the whole sequence.
        size: P, the number of processes.
        rank: this process.
        order: one of ``ORDERS``.
    Returns:
        (L / P,) integers, increasing.
    Raises:
        ValueError: an unknown order, a length that P (for "zigzag", 2P) does not divide, a rank that is not below P.
    """
    check_choice("order", order, ORDERS)
    check_count("size", size)
    if check_count("rank", rank, least=0) >= size:
        raise mismatch("rank", f"an integer below size = {size}", rank)
    parts = 2 * size if order == "zigzag" else size
    if check_count("L", L) % parts:
        raise mismatch("L", f"a multiple of {parts}, for order {order!r} on {size} processes", L)
    every = torch.arange(L)
    if order == "striped":
        return every[rank::size]
    chunks = every.chunk(parts)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if order == "zigzag" else chunks[rank]


def take_slice(batch: Any, *, group: dist.ProcessGroup | None = None, order: str = "zigzag") -> Any:
    """Cut this process's slice of the sequence out of each tensor of a batch.

    Inputs and targets are made from the whole sequence first and cut afterwards: a slice's last target lies in another
    slice.

    Args:
        batch: a tensor (B, L, …), or a nest of them.
        group: the processes that share a sequence; all of them by default.
        order: as for :func:`slice_positions`.
    Returns:
        The same nest, of tensors (B, L / P, …).
    Raises:
        ValueError: as for :func:`slice_positions`.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def cut(x: Tensor) -> Tensor:
        return x[:, slice_positions(x.shape[1], size, rank, order).to(x.device)]

    return tree_map(cut, batch)


def _pieces(length: int, size: int, mine: int, theirs: int, order: str, is_causal: bool) -> Iterator[Piece]:
    """Yield the parts of (my queries) × (their keys) in which something is allowed; none needs a mask of its own."""
    whole = slice(0, length)
    if not is_causal:
        yield whole, whole, False
    elif order == "striped":  # query i stands at iP + mine, key j at jP + theirs
        if theirs <= mine:
            yield whole, whole, True  # j ≤ i
        elif length > 1:
            yield slice(1, length), slice(0, length - 1), True  # j < i: the same triangle, a row further down
    else:
        names = (
            ((mine, 2 * size - 1 - mine), (theirs, 2 * size - 1 - theirs))
            if order == "zigzag"
            else ((mine,), (theirs,))
        )
        width = length // len(names[0])
        for a, query_chunk in enumerate(names[0]):
            for b, key_chunk in enumerate(names[1]):
                if key_chunk <= query_chunk:
                    yield slice(a * width, (a + 1) * width), slice(b * width, (b + 1) * width), key_chunk == query_chunk


def ring_work(L: int, size: int, order: str = "zigzag", *, is_causal: bool = True) -> list[list[int]]:
    """Count the pairs of a query and a key that each process scores at each step of the ring.

    All wait for the slowest, so a step costs what its busiest process does: the sum over the steps of the row's largest
    number is what to compare.

    Args:
        L: length of the whole sequence.
        size: P, the number of processes.
        order: as for :func:`slice_positions`.
        is_causal: count the allowed pairs only.
    Returns:
        P rows, one a step, of P numbers, one a process.
    Raises:
        ValueError: as for :func:`slice_positions`.
    """
    length = len(slice_positions(L, size, 0, order))

    def count(mine: int, theirs: int) -> int:
        pairs = 0
        for rows, columns, diagonal in _pieces(length, size, mine, theirs, order, is_causal):
            n, m = rows.stop - rows.start, columns.stop - columns.start
            pairs += n * (n + 1) // 2 if diagonal else n * m
        return pairs

    return [[count(mine, (mine - step) % size) for mine in range(size)] for step in range(size)]


class _Ring:
    """The processes in a circle: each sends to the next and receives from the one before."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to send these and to receive their like; the function returned waits, and gives what came."""
        sent = [x.contiguous() for x in tensors]
        if self.size == 1:
            return lambda: sent
        came = [torch.empty_like(x) for x in sent]
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = [dist.P2POp(dist.isend, x, after, self.group, tag) for tag, x in enumerate(sent)]
        operations += [dist.P2POp(dist.irecv, x, before, self.group, tag) for tag, x in enumerate(came)]
        requests = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            for request in requests:
                request.wait()
            sent.clear()  # until here it had to live
            return came

        return wait


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, group, order, is_causal, scale, size):
        ring = _Ring(group)
        options = {"scale": scale, "block_size": size}
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = query.new_zeros(*query.shape[:3], value.shape[3], dtype=work)
        log_sums = query.new_full((*query.shape[:3], 1), -torch.inf, dtype=work)
        k, v = key, value
        for step in range(ring.size):
            coming = ring.pass_on((k, v)) if step + 1 < ring.size else None  # travels while we compute
            theirs = (ring.rank - step) % ring.size
            for rows, columns, diagonal in _pieces(query.shape[2], ring.size, ring.rank, theirs, order, is_causal):
                part = partial_attention(
                    query[:, :, rows], k[:, :, columns], v[:, :, columns], is_causal=diagonal, **options
                )
                seen = OnlineSoftmax.after(output[:, :, rows].flatten(0, 1), log_sums[:, :, rows].flatten(0, 1))
                both = seen.merge(OnlineSoftmax.after(*(x.flatten(0, 1) for x in part)))
                output[:, :, rows] = both.output().view_as(part[0])
                log_sums[:, :, rows] = both.log_sum().view_as(part[1])
            if coming is not None:
                k, v = coming()
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.ring, ctx.order, ctx.is_causal, ctx.options = ring, order, is_causal, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, log_sums = ctx.saved_tensors
        ring = ctx.ring
        grad_query = torch.zeros_like(query, dtype=log_sums.dtype)
        k, v = key, value
        grads = [torch.zeros_like(x, dtype=log_sums.dtype) for x in (key, value)]  # they travel with their keys
        for step in range(ring.size):
            coming = ring.pass_on((k, v)) if step + 1 < ring.size else None
            theirs = (ring.rank - step) % ring.size
            for rows, columns, diagonal in _pieces(
                query.shape[2], ring.size, ring.rank, theirs, ctx.order, ctx.is_causal
            ):
                dq, dk, dv, _ = partial_gradients(
                    query[:, :, rows],
                    k[:, :, columns],
                    v[:, :, columns],
                    output[:, :, rows],
                    log_sums[:, :, rows],
                    grad_output[:, :, rows],
                    is_causal=diagonal,
                    **ctx.options,
                )
                grad_query[:, :, rows] += dq
                grads[0][:, :, columns] += dk
                grads[1][:, :, columns] += dv
            if coming is not None:
                k, v = coming()
            grads = ring.pass_on(grads)()  # after the last step they are home
        grad_key, grad_value = grads
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), *(None,) * 5


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    order: str = "zigzag",
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 256,
) -> Tensor:
    """Compute exact attention over a sequence of which each process holds a slice ({cite}`liu2024`).

    Queries stay; keys and values travel around the ring, one process further at each step, while those at hand are
    attended to. What the steps give is joined by the logarithms of their sums, as tiles are in
    :func:`attnbook.mechanisms.tiled_attention`. In the backward pass keys and values travel once more, with their
    gradients. Pieces that causality forbids are not computed.

    Args:
        query: (B, H, L / P, D) float, this process's slice.
        key: (B, Hkv, L / P, D), of the same positions.
        value: (B, Hkv, L / P, Dv).
        group: the P processes that share the sequence; all of them by default.
        order: which positions each holds, as for :func:`slice_positions`.
        is_causal: let each query see its own position and earlier ones.
        scale: factor of the scores; 1/√D by default.
        block_size: rows and columns of a tile.
    Returns:
        (B, H, L / P, Dv), dtype of query. Differentiable once.
    Raises:
        ValueError: shapes or types that do not match, an unknown order, NaN in query or key.
    Cost: O(L²D/P) time, balanced over the processes unless contiguous and causal; O(L/P) memory; each process sends its
    keys and values P − 1 times forward, and with the gradients' P turns backward.
    Differs from the paper: the feed-forward network is not computed in blocks.
    """
    shape = check_attention(query, key, value)
    if shape.S != shape.L:
        raise mismatch("key", f"S = {shape.L} positions, those of query", key)
    check_choice("order", order, ORDERS)
    if order == "zigzag" and is_causal and shape.L % 2:
        raise mismatch("query", "an even number of positions, for order 'zigzag'", query)
    check_count("block_size", block_size)
    check_query_and_key(query, key)
    scale = shape.D**-0.5 if scale is None else float(scale)
    return _RingAttention.apply(query, key, value, group, order, is_causal, scale, block_size)


class RingSelfAttention(MultiHeadAttention):
    """A self-attention layer that holds one slice of the sequence: the weights of another layer, on the ring.

    Args:
        layer: whose projections are taken over (not copied), under the same names.
        group: the processes that share a sequence; all of them by default.
        order: as for :func:`slice_positions`.
    Raises:
        ValueError: a layer that drops weights, or normalises by another function than softmax.
    """

    def __init__(self, layer: MultiHeadAttention, group: dist.ProcessGroup | None = None, order: str = "zigzag"):
        if layer.dropout:
            raise mismatch("layer", "dropout = 0 of the weights", f"{layer.dropout}")
        if resolve(layer.normalizer) is not softmax:
            raise mismatch("layer", "the normalizer 'softmax'", repr(layer.normalizer))
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads, self.head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        self.dropout, self.normalizer, self.backend = layer.dropout, layer.normalizer, layer.backend
        self.rotary, self.scale = layer.rotary, layer.scale
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj
        self.group, self.order = group, check_choice("order", order, ORDERS)
        self.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        is_causal: bool = False,
        cache: Any = None,
        need_weights: bool = False,
    ) -> Tensor:
        """Attend from this slice to the whole sequence.

        Args:
            query: (B, L / P, E), this process's slice.
            key: None: self-attention only.
            value: None.
            attn_mask: None.
            score_bias: None.
            is_causal: let each position see itself and earlier ones of the whole sequence.
            cache: None.
            need_weights: False: the weights are never whole.
        Returns:
            (B, L / P, E).
        Raises:
            ValueError: one of the others is given, and as for :func:`ring_attention`.
        """
        absent = {"key": key, "value": value, "attn_mask": attn_mask, "score_bias": score_bias, "cache": cache}
        for name, given in absent.items():
            if given is not None:
                raise mismatch(name, "None, on a ring", given)
        if need_weights:
            raise mismatch("need_weights", "False, on a ring", need_weights)
        q = self._split(query, self.q_proj, "query")
        k = self._split(query, self.k_proj, "query")
        v = self._split(query, self.v_proj, "query")
        if self.rotary is not None:
            size = dist.get_world_size(self.group)
            positions = slice_positions(size * q.shape[2], size, dist.get_rank(self.group), self.order).to(q.device)
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        mixed = ring_attention(q, k, v, group=self.group, order=self.order, is_causal=is_causal, scale=self.scale)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, H, L/P, D) → (B, L/P, E)


class ContextParallel(nn.Module):
    """A decoder of which each process computes the logits of its slice of every sequence.

    Its gradients are those of this slice's loss; :func:`attnbook.train.parallel.data_parallel` or ``shard`` around it,
    over the same processes, averages them. The weights are the decoder's own.

    Args:
        model: changed in place: its self-attentions become :class:`RingSelfAttention`.
        group: the processes that share a sequence; all of them by default.
        order: as for :func:`slice_positions`.
    Raises:
        ValueError: no :class:`attnbook.models.decoder.Decoder`, and as for :class:`RingSelfAttention`.
    """

    def __init__(self, model: Decoder, group: dist.ProcessGroup | None = None, order: str = "zigzag"):
        super().__init__()
        if not isinstance(model, Decoder):
            raise mismatch("model", "a Decoder", model)
        rings = [RingSelfAttention(block.attention, group, order) for block in model.blocks]
        for block, ring in zip(model.blocks, rings, strict=True):
            block.attention = ring
        self.module, self.group, self.order = model, group, order

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the token that follows each position of this process's slice.

        Args:
            tokens: (B, L / P) integers, from :func:`take_slice`.
        Returns:
            (B, L / P, V).
        Raises:
            ValueError: another rank, or a whole sequence longer than the context length.
        """
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        size = dist.get_world_size(self.group)
        L, most = size * tokens.shape[1], self.module.config.context_length
        if most < L:
            raise mismatch("tokens", f"at most {most // size} positions a process", f"{tokens.shape[1]}")
        if self.module.position is None:
            return self.module(tokens)
        positions = slice_positions(L, size, dist.get_rank(self.group), self.order).to(tokens.device)
        table = self.module.position[positions]  # the decoder reads its first rows: let those be this slice's
        return torch.func.functional_call(self.module, {"position": table}, (tokens,))
