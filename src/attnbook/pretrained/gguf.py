"""Read GGUF, the file format of llama.cpp: fields, and matrices in four or eight bits a weight.

The package ``gguf`` reads it too (the tests compare), but takes ten times as long over a vocabulary's strings.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnbook.shapes import mismatch

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
BLOCK = 32  # weights that share a scale


class _Cursor:
    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.content, self.place)
        self.place += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        self.place += size
        return self.content[self.place - size : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        form = f"<{count}{_SCALARS[inner]}"
        self.place += struct.calcsize(form)
        return list(struct.unpack_from(form, self.content, self.place - struct.calcsize(form)))


def _plain(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float32).copy()


def _four_bits(raw: np.ndarray) -> np.ndarray:
    """Q4_1: a scale d and an offset m in float16, then 32 numbers q of four bits, low halves first: q · d + m."""
    blocks = raw.reshape(-1, 4 + BLOCK // 2)
    scale, offset = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
    packed = blocks[:, 4:]
    return np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32) * scale + offset


def _eight_bits(raw: np.ndarray) -> np.ndarray:
    """Q8_0: a scale d in float16, then 32 signed bytes q: q · d."""
    blocks = raw.reshape(-1, 2 + BLOCK)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scale


# number of the type: bytes that a block of 32 weights takes, and how to read them
_TYPES = {0: (4 * BLOCK, _plain), 3: (4 + BLOCK // 2, _four_bits), 8: (2 + BLOCK, _eight_bits)}


def read_gguf(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a GGUF file of version 3 with weights in float32, Q4_1 or Q8_0.

    Args:
        content: of the file.
    Returns:
        Its fields by name, and its tensors by name, float32, the last axis first in the file.
    Raises:
        ValueError: no such file, a truncated one, or another type of weights.
    """
    cursor = _Cursor(content)
    try:
        if content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        cursor.place = 4
        version, tensors, fields = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
        if version != 3:
            raise ValueError(f"version {version}")
        found = {}
        for _ in range(fields):
            name = cursor.text()
            found[name] = cursor.value(cursor.scalar("I"))
        heads = []
        for _ in range(tensors):
            name = cursor.text()
            shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
            heads.append((name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")))
        align = found.get("general.alignment", 32)
        start = -(-cursor.place // align) * align
        raw = np.frombuffer(content, np.uint8)
        weights = {}
        for name, shape, kind, offset in heads:
            if kind not in _TYPES:
                raise ValueError(f"{name} has weights of type {kind}")
            size, decode = _TYPES[kind]
            count = int(np.prod(shape))
            part = raw[start + offset : start + offset + count * size // BLOCK]
            weights[name] = torch.from_numpy(decode(part).reshape(shape))
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise mismatch("content", "a GGUF file, version 3, in float32, Q4_1 or Q8_0", str(error)) from None
    return found, weights
