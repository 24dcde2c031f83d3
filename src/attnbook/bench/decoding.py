"""Decoding in nanoGPT's character setting, beside Hugging Face's GPT-2, nanoGPT and merely reading the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnbook.bench import nanogpt as nanogpt_model
from attnbook.bench.case import Comparison
from attnbook.mechanisms.stored import multiplies_fast
from attnbook.models import Decoder, DecoderConfig, generate
from attnbook.models.decoding import Decoding

CONFIG = DecoderConfig(vocab_size=65, context_length=256, width=384, depth=6, num_heads=6)  # 10.7 M parameters
NEW = 200  # tokens to produce


def gpt2(config: DecoderConfig, **settings: Any) -> nn.Module:
    """Make Hugging Face's GPT-2 in the shape of a decoder, weights at random.

    Args:
        config: the shape, in GPT-2's manner; there is no dropout.
        settings: further ones, in place of those that the package has for GPT-2.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    whole = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.num_heads,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    return GPT2LMHeadModel(whole)


def hugging_face(batch_size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a call of Hugging Face's greedy ``generate`` with its cache, on GPT-2 of the same shape.

    Args:
        batch_size: B.
        dtype: of the weights.
    """
    model = gpt2(CONFIG).to(dtype).eval()
    prompt = torch.zeros(batch_size, 1, dtype=torch.int64)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def reading(model: Decoder) -> Callable[[], None]:
    """Return a call that multiplies every matrix of a model with a vector, once a token: the weights are read, no more.

    Args:
        model: whose matrices to read.
    """
    matrices = [p.detach() for name, p in model.named_parameters() if p.dim() == 2 and name != "position"]
    vectors = {matrix.shape[1]: torch.randn(matrix.shape[1]) for matrix in matrices}

    def read() -> None:
        for _ in range(NEW):
            for matrix in matrices:
                torch.mv(matrix, vectors[matrix.shape[1]])

    return torch.inference_mode()(read)


def nanogpt_generate(path: Path) -> Callable[[], Any]:
    """Return a call of nanoGPT's ``generate``, which has no cache, for one text; with one token to choose from.

    Args:
        path: where its model.py is.
    """
    model = nanogpt_model.build(path, CONFIG).eval()
    return lambda: model.generate(torch.zeros(1, 1, dtype=torch.int64), NEW, top_k=1)


def suite(nanogpt: Path | None = None) -> Iterator[Comparison]:
    """Yield the comparisons: one text, against the peers and against reading; eight at once, in the peer's better type.

    Args:
        nanogpt: where nanoGPT's model.py is; without it, the line that compares with it is left out.
    """
    model = Decoder(CONFIG).eval()
    quick = Decoding(model)

    def ours(batch_size: int) -> Callable[[], Any]:
        prompt = torch.zeros(batch_size, 1, dtype=torch.int64)
        return lambda: generate(quick, prompt, max_new_tokens=NEW, temperature=0)

    what = f"{NEW} tokens, greedy"
    setting = "10.7 M parameters float32, batch {}"
    name, single, half = "Hugging Face GPT-2", torch.float32, torch.bfloat16
    yield Comparison("decoding", what, setting.format(1), ours(1), {name: hugging_face(1, single)}, 1 / 2.2)
    if nanogpt is None:
        nanogpt_model.left_out("decoding")
    else:
        peer = {nanogpt_model.NAME: nanogpt_generate(nanogpt)}
        yield Comparison("decoding", what, setting.format(1), ours(1), peer, 1 / 8)
    yield Comparison("decoding", what, setting.format(1), ours(1), {"reading the weights": reading(model)}, 1 / 0.5)
    types = (single, half) if multiplies_fast(half) else (single,)  # elsewhere it takes ten times as long in bfloat16
    peers = {f"{name}, {str(dtype).removeprefix('torch.')}": hugging_face(8, dtype) for dtype in types}
    yield Comparison("decoding", what, setting.format(8), ours(8), peers, 1 / 1.8)
