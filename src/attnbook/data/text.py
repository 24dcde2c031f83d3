"""Plain text, as characters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnbook.data.base import Card, Source
from attnbook.shapes import check_choice, check_count, mismatch

CARDS = {
    "tinyshakespeare": Card(
        name="tinyshakespeare",
        title="Tiny Shakespeare",
        content="Scenes from Shakespeare's plays as one text of 1,115,394 characters, 65 of them different.",
        licence="public-domain text",
        citation=("karpathy2015",),
        home="https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare",
        returns="a CharacterText; the first 90 % of the characters are for training, as in nanoGPT. No options.",
        sources=(
            Source(
                "input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            ),
        ),
        note="One author, one genre, one megabyte: losses on it compare methods, and say little of language at large.",
    )
}


@dataclass(frozen=True)
class CharacterText:
    """A text whose tokens are its characters.

    Attributes:
        text: the whole text.
        characters: the different characters in order; a token is a character's place here.
        train: (length,) int64.
        validation: (length,) int64.
    """

    text: str
    characters: str
    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, text: str) -> CharacterText:
        """Take the characters of a text for tokens, and its last tenth for validation.

        Args:
            text: not empty.
        """
        characters = "".join(sorted(set(text)))
        place = {character: i for i, character in enumerate(characters)}
        tokens = torch.tensor([place[character] for character in text])
        cut = int(0.9 * len(tokens))
        return cls(text, characters, tokens[:cut], tokens[cut:])

    def encode(self, text: str) -> Tensor:
        """Turn characters into tokens (length,).

        Raises:
            ValueError: a character that the vocabulary lacks.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise mismatch("text", "characters of the vocabulary", f"{unknown}")
        return torch.tensor([self.characters.index(character) for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Turn tokens (length,) into characters."""
        return "".join(self.characters[token] for token in tokens.tolist())

    def batch(self, split: str, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cut random windows: inputs (B, L) and, one character on, targets (B, L).

        Raises:
            ValueError: an unknown split, or a window longer than the text.
        """
        tokens = getattr(self, check_choice("split", split, ("train", "validation")))
        check_count("batch_size", batch_size)
        if check_count("length", length) >= len(tokens):
            raise mismatch("length", f"below the {len(tokens)} tokens of the split", length)
        starts = torch.randint(len(tokens) - length, (batch_size,), generator=generator)
        windows = tokens[starts[:, None] + torch.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]


def _load() -> CharacterText:
    return CharacterText.of(CARDS["tinyshakespeare"].read("input.txt").decode("ascii"))


LOADERS = {"tinyshakespeare": _load}
