"""Decoding in nanoGPT's character setting, beside Hugging Face's GPT-2 and beside merely reading the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnbook.bench.case import Comparison
from attnbook.models import Decoder, DecoderConfig, generate
from attnbook.models.decoding import Decoding

CONFIG = DecoderConfig(vocab_size=65, context_length=256, width=384, depth=6, num_heads=6)  # 10.7 M parameters
NEW = 200  # tokens to produce


def hugging_face(batch_size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a call of Hugging Face's greedy ``generate`` with its cache, on GPT-2 of the same shape, random weights.

    Args:
        batch_size: B.
        dtype: of the weights.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=CONFIG.vocab_size,
        n_positions=CONFIG.context_length,
        n_embd=CONFIG.width,
        n_layer=CONFIG.depth,
        n_head=CONFIG.num_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()
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


def suite() -> Iterator[Comparison]:
    """Yield the comparisons: one text, against Hugging Face and against reading; eight at once, in its better type."""
    model = Decoder(CONFIG).eval()
    quick = Decoding(model)

    def ours(batch_size: int) -> Callable[[], Any]:
        prompt = torch.zeros(batch_size, 1, dtype=torch.int64)
        return lambda: generate(quick, prompt, max_new_tokens=NEW, temperature=0)

    what = f"{NEW} tokens, greedy"
    setting = "10.7 M parameters float32, batch {}"
    name, single, half = "Hugging Face GPT-2", torch.float32, torch.bfloat16
    yield Comparison("decoding", what, setting.format(1), ours(1), {name: hugging_face(1, single)}, 1 / 2.2)
    yield Comparison("decoding", what, setting.format(1), ours(1), {"reading the weights": reading(model)}, 1 / 0.5)
    peers = {f"{name}, {str(dtype).removeprefix('torch.')}": hugging_face(8, dtype) for dtype in (single, half)}
    yield Comparison("decoding", what, setting.format(8), ours(8), peers, 1 / 1.8)
