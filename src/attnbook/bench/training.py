"""Steps of training in nanoGPT's character setting, beside its model, Hugging Face's and mere matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnbook.bench import nanogpt as nanogpt_model
from attnbook.bench.case import Comparison
from attnbook.bench.decoding import CONFIG, gpt2
from attnbook.mechanisms.stored import multiplies_fast
from attnbook.models import Decoder, DecoderConfig
from attnbook.train import fit
from attnbook.train.losses import token_loss
from attnbook.train.throughput import training_flops

BATCH = 16
PRODUCT = 2048  # side of the matrices whose product is the machine's ceiling
TINY = DecoderConfig(vocab_size=65, context_length=64, width=128, depth=4, num_heads=4)  # nanoGPT's for a laptop
TINY_BATCH, TINY_STEPS = 12, 20


def batch_of(config: DecoderConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, (batch_size, context_length) tokens each.

    Args:
        config: whose vocabulary and context to fill.
        batch_size: B.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (batch_size, config.context_length + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser that all are trained with: fused AdamW, at nanoGPT's rates.

    Args:
        model: whose parameters to train.
    """
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def step(model: nn.Module, loss: Callable[[nn.Module], Tensor], *, autocast: bool) -> Callable[[], None]:
    """Return a call that takes one step: forward, backward, update.

    Args:
        model: put into training mode.
        loss: the model's loss on the batch.
        autocast: multiply in bfloat16.
    """
    model.train()
    optimizer = adamw(model)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model)
        value.backward()
        optimizer.step()

    return once


def products(operations: float) -> Callable[[], None]:
    """Return a call that does so many operations in products of large square matrices, the last of them lower.

    Args:
        operations: additions and multiplications.
    """
    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    times, rows = divmod(round(operations / (2 * PRODUCT**2)), PRODUCT)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b)
        torch.mm(a[:rows], b)

    return multiply


def loops() -> dict[str, Callable[[], list[float]]]:
    """Return calls that train a tiny model by :func:`attnbook.train.fit` and by a bare loop, and give the losses."""
    batch = batch_of(TINY, TINY_BATCH)
    torch.manual_seed(0)
    ours = Decoder(TINY)
    bare = deepcopy(ours)
    ours_optimizer, bare_optimizer = adamw(ours), adamw(bare)

    def by_fit() -> list[float]:
        return fit(ours, token_loss, [batch], steps=TINY_STEPS, optimizer=ours_optimizer, device="cpu").losses

    def by_hand() -> list[float]:
        losses = []
        for _ in range(TINY_STEPS):
            bare_optimizer.zero_grad(set_to_none=True)
            loss = token_loss(bare, batch)
            loss.backward()
            bare_optimizer.step()
            losses.append(loss.item())
        return losses

    return {"train.fit": by_fit, "a bare loop": by_hand}


def suite(nanogpt: Path | None = None) -> Iterator[Comparison]:
    """Yield the comparisons: one step in float32 and under bfloat16 autocast, and the loop around the steps.

    Args:
        nanogpt: where nanoGPT's model.py is; without it, the lines that compare with it are left out.
    """
    inputs, targets = batch = batch_of(CONFIG, BATCH)
    setting = f"{CONFIG.depth} layers × {CONFIG.width}, {CONFIG.num_heads} heads, ({BATCH}, {CONFIG.context_length})"
    model = Decoder(CONFIG)
    operations = training_flops(model, CONFIG.context_length) * inputs.numel()

    def by_us(net: nn.Module) -> Tensor:
        return token_loss(net, batch)

    def by_nanogpt(net: nn.Module) -> Tensor:
        return net(inputs, targets)[1]

    def by_hugging_face(net: nn.Module) -> Tensor:
        return cross_entropy(net(inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())

    if nanogpt is None:
        nanogpt_model.left_out("training")
    goals = {torch.float32: (1.0, 1 / 1.4), torch.bfloat16: (1 / 1.15, 1 / 1.6)}
    for dtype, (to_nanogpt, to_hugging_face) in goals.items():
        half = dtype == torch.bfloat16
        if half and not multiplies_fast(dtype):
            print("training: bfloat16 is left out; this processor has no such products, and a step takes a minute")
            continue
        shown = f"{setting}, {'bfloat16 autocast' if half else 'float32'}"
        ours = step(model, by_us, autocast=half)
        if nanogpt is not None:
            peer = step(nanogpt_model.build(nanogpt, CONFIG), by_nanogpt, autocast=half)
            yield Comparison("training", "one step", shown, ours, {nanogpt_model.NAME: peer}, to_nanogpt)
        for name, settings, goal in (
            ("Hugging Face GPT-2", {}, to_hugging_face),
            ("Hugging Face GPT-2, GELU in one piece as ours", {"activation_function": "gelu"}, None),
        ):
            peer = step(gpt2(CONFIG, **settings), by_hugging_face, autocast=half)
            yield Comparison("training", "one step", shown, ours, {name: peer}, goal)
        if not half:
            peer = {f"products of {PRODUCT} × {PRODUCT}, as many operations": products(operations)}
            yield Comparison("training", "one step", shown, ours, peer, 1 / 0.68)
    loop = loops()
    ours = loop.pop("train.fit")
    shown = f"{TINY.depth} layers × {TINY.width}, {TINY.num_heads} heads, ({TINY_BATCH}, {TINY.context_length})"
    what = f"{TINY_STEPS} steps by train.fit"
    yield Comparison("training", what, f"{shown}, float32", ours, loop, 1.05)
