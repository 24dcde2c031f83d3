"""Forecasting of time series from patches: PatchTST's shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.layers import TransformerBlock, make_norm
from attnbook.models.count import block, linear
from attnbook.shapes import check_count, check_probability, check_tensor, mismatch


@dataclass(frozen=True)
class PatchTSTConfig:
    """The shape of a :class:`PatchTST`.

    Attributes:
        lookback: steps that the model sees.
        horizon: steps that it forecasts.
        width: E.
        depth: number of blocks.
        num_heads: H.
        patch_length: steps of a patch.
        stride: steps from one patch to the next.
        hidden: width of the feed-forward networks; 4E by default.
        normalise: take each series' mean and deviation away before, and give them back after.
        dropout: of the weights and what each part adds.
    """

    lookback: int
    horizon: int
    width: int
    depth: int
    num_heads: int
    patch_length: int = 16
    stride: int = 8
    hidden: int | None = None
    normalise: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lookback", "horizon", "width", "depth", "num_heads", "patch_length", "stride"):
            check_count(name, getattr(self, name))
        check_probability("dropout", self.dropout)
        if self.patch_length > self.lookback:
            raise mismatch("patch_length", f"at most lookback = {self.lookback}", self.patch_length)

    @property
    def patches(self) -> int:
        """The number of patches, ⌊(lookback − patch length) / stride⌋ + 2, one of them of padding in part."""
        return (self.lookback - self.patch_length) // self.stride + 2

    def num_parameters(self) -> int:
        """Count the parameters by formula; the number of channels does not enter it."""
        E = self.width
        inside = self.depth * block(E, self.hidden) + 2 * E
        return linear(self.patch_length, E) + self.patches * E + inside + linear(self.patches * E, self.horizon)


class PatchTST(nn.Module):
    """Forecast each channel of a series from patches of its past ({cite}`nie2023`).

    Patches are the tokens. The channels share all weights and never meet (channel independence). Each series is brought
    to mean 0 and deviation 1 before, and back after (instance normalisation). Differs from the paper: layer norms
    before the parts, where the authors' encoder has batch norms after them; and all patches of one channel are
    flattened into one linear head, as in its supervised form, while the masked pre-training is left out.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: PatchTSTConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.embedding = nn.Linear(config.patch_length, E)
        self.position = nn.Parameter(torch.empty(config.patches, E))
        self.blocks = nn.ModuleList(
            TransformerBlock(E, config.num_heads, hidden=config.hidden, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E)
        self.head = nn.Linear(config.patches * E, config.horizon)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, series: Tensor) -> Tensor:
        """Forecast.

        Args:
            series: (B, lookback, C), C channels.
        Returns:
            (B, horizon, C).
        Raises:
            ValueError: another rank or number of steps.
        """
        check_tensor("series", series, "B steps C")
        config = self.config
        if series.shape[1] != config.lookback:
            raise mismatch("series", f"{config.lookback} steps on axis 1", series)
        x = series.transpose(1, 2)  # (B, C, T)
        mean, deviation = 0.0, 1.0
        if config.normalise:
            mean = x.mean(-1, keepdim=True)
            deviation = (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        x = (x - mean) / deviation
        x = torch.cat([x, x[..., -1:].expand(-1, -1, config.stride)], -1)  # the last value, a stride's worth of times
        x = x.unfold(-1, config.patch_length, config.stride).flatten(0, 1)  # (B·C, N, P)
        x = self.embedding(x) + self.position
        for layer in self.blocks:
            x = layer(x)
        x = self.head(self.norm(x).flatten(1)).unflatten(0, (len(series), -1))  # (B, C, horizon)
        return (x * deviation + mean).transpose(1, 2)
