"""A recurrent language model, the baseline that the Transformer replaced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnbook.shapes import check_count, check_probability, check_tensor


class LSTMLanguageModel(nn.Module):
    """Predict the next token from an LSTM's state ({cite}`mikolov2010`, with the cell of {cite}`hochreiter1997`).

    Args:
        vocab_size: V.
        width: size of the embeddings and of the state.
        depth: number of layers.
        dropout: between layers, in training.
    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, vocab_size: int, width: int, *, depth: int = 1, dropout: float = 0.0):
        super().__init__()
        check_count("vocab_size", vocab_size)
        check_count("width", width)
        check_count("depth", depth)
        self.embedding = nn.Embedding(vocab_size, width)
        drop = check_probability("dropout", dropout) if depth > 1 else 0.0
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=drop)
        self.output = nn.Linear(width, vocab_size)
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Score the token that follows each position.

        Args:
            tokens: (B, L) integers below V.
            state: of :meth:`step`; zeros by default.
        Returns:
            (B, L, V), unnormalised log-probabilities.
        Raises:
            ValueError: another rank.
        """
        return self.step(tokens, state)[0]

    def step(self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Score as :meth:`forward` does, and return the state to continue from too."""
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        hidden, state = self.lstm(self.embedding(tokens), state)
        return self.output(hidden), state
