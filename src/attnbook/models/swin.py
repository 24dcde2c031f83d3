"""Swin: a Vision Transformer that attends within windows, and shifts them from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.layers import TransformerBlock, make_norm
from attnbook.models.patches import (
    PatchEmbedding,
    WindowBias,
    merge_windows,
    partition_windows,
    shifted_window_mask,
)
from attnbook.shapes import check_count, check_tensor, mismatch, tensor_shape


@dataclass(frozen=True)
class SwinConfig:
    """The shape of a :class:`Swin`. The defaults are Swin-T's manner ({cite}`liu2021`, §3.3).

    Attributes:
        image_size: rows, and columns.
        patch_size: of a patch.
        channels: of the image.
        width: E of the first stage; it doubles from stage to stage.
        depths: number of blocks of each stage.
        num_heads: H of each stage.
        window: rows, and columns, of a window; a stage whose grid is no larger has one window.
        num_classes: of the head; None for no head.
        ratio: width of the feed-forward networks over that of the stage.
        norm_eps: what the norms add to the variance.
        dropout: of the embeddings, the weights and what each part adds.
    """

    image_size: int
    patch_size: int
    channels: int
    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int = 7
    num_classes: int | None = None
    ratio: int = 4
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "width", "window", "ratio"):
            check_count(name, getattr(self, name))
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
        if not self.depths or len(self.depths) != len(self.num_heads):
            wanted = f"as many as depths, {len(self.depths)}, and at least one"
            raise mismatch("num_heads", wanted, f"{len(self.num_heads)}")
        for name in ("depths", "num_heads"):
            for count in getattr(self, name):
                check_count(name, count)
        if self.image_size % self.patch_size:
            raise mismatch("patch_size", f"a divisor of image_size = {self.image_size}", self.patch_size)
        for i, grid in enumerate(self.grids()):
            if grid % min(self.window, grid):
                raise mismatch("window", f"a divisor of stage {i}'s grid, {grid}, or no smaller", self.window)
            if grid % 2 and i + 1 < len(self.depths):
                raise mismatch("image_size", f"one whose grid can be halved after stage {i}", f"a grid of {grid}")

    def grids(self) -> list[int]:
        """Return the rows, and columns, of each stage's grid."""
        return [self.image_size // self.patch_size // 2**i for i in range(len(self.depths))]

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E = self.width
        count = self.channels * self.patch_size**2 * E + 3 * E
        for i, (depth, heads, grid) in enumerate(zip(self.depths, self.num_heads, self.grids(), strict=True)):
            hidden, window = self.ratio * E, min(self.window, grid)
            block = 4 * (E * E + E) + 2 * E * hidden + hidden + E + 4 * E + (2 * window - 1) ** 2 * heads
            count += depth * block
            if i + 1 < len(self.depths):
                count += 8 * E + 8 * E * E  # the merging's norm and projection
                E *= 2
        return count + 2 * E + ((E + 1) * self.num_classes if self.num_classes else 0)


class SwinBlock(nn.Module):
    """A Transformer block in each window of a grid, rolled before and rolled back after ({cite}`liu2021`, eq. 3).

    All but the attention treats cells one by one, so that the whole block may work on windows.

    Args:
        width: E.
        num_heads: H.
        grid: rows, and columns, of the grid.
        window: rows, and columns, of a window.
        shift: by how much the grid is rolled.
        block_options: passed on to :class:`attnbook.layers.TransformerBlock`.
    Raises:
        ValueError: as for the parts.
    """

    def __init__(self, width: int, num_heads: int, grid: int, window: int, shift: int, **block_options: Any):
        super().__init__()
        self.grid, self.window, self.shift = (grid,) * 2, (window,) * 2, shift
        self.block = TransformerBlock(width, num_heads, **block_options)
        self.bias = WindowBias(num_heads, self.window)
        mask = shifted_window_mask(self.grid, self.window, (shift,) * 2) if shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, *, need_weights: bool = False) -> Any:
        """Update the grid.

        Args:
            x: (B, rows, columns, E).
            need_weights: return the weights too.
        Returns:
            (B, rows, columns, E); with need_weights also (B · windows, H, N, N), N the cells of a window, in the
            rolled grid.
        Raises:
            ValueError: another size.
        """
        check_tensor("x", x, "B rows columns E")
        if x.shape[1:3] != self.grid:
            raise mismatch("x", f"(B, rows, columns, E) with a grid of {self.grid}", tensor_shape(x))
        x = x.roll((-self.shift, -self.shift), (1, 2))
        mask = None if self.mask is None else self.mask.repeat(len(x), 1, 1, 1)
        windows = partition_windows(x, self.window)
        made = self.block(windows, attn_mask=mask, score_bias=self.bias(), need_weights=need_weights)
        windows, weights = made[:2] if need_weights else (made, None)
        x = merge_windows(windows, self.window, self.grid).roll((self.shift, self.shift), (1, 2))
        return (x, weights) if need_weights else x


class PatchMerging(nn.Module):
    """Join four neighbouring cells into one of twice the width ({cite}`liu2021`, §3.1).

    Args:
        width: E.
        norm_eps: what the norm adds to the variance.
    """

    def __init__(self, width: int, norm_eps: float | None = None):
        super().__init__()
        self.norm = make_norm("layer", 4 * width, norm_eps)
        self.projection = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, rows, columns, E) to (B, rows / 2, columns / 2, 2E)."""
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.projection(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    """Classify an image with attention in shifted windows, at a cost linear in its size ({cite}`liu2021`).

    Differs from the paper: no stochastic depth; grids that windows do not fill are refused, where the authors' code
    pads them.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.patches = PatchEmbedding(config.channels, config.image_size, config.patch_size, E)
        self.first_norm = make_norm("layer", E, config.norm_eps)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        grids = config.grids()
        for i, (depth, heads, grid) in enumerate(zip(config.depths, config.num_heads, grids, strict=True)):
            window = min(config.window, grid)
            shift = window // 2 if grid > window else 0
            options = {"hidden": config.ratio * E, "norm_eps": config.norm_eps, "dropout": config.dropout}
            blocks = (SwinBlock(E, heads, grid, window, shift * (j % 2), **options) for j in range(depth))
            self.stages.append(nn.ModuleList(blocks))
            if i + 1 < len(grids):
                self.merges.append(PatchMerging(E, config.norm_eps))
                E *= 2
        self.norm = make_norm("layer", E, config.norm_eps)
        self.head = nn.Linear(E, config.num_classes) if config.num_classes else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, image: Tensor) -> list[Tensor]:
        """Turn an image into grids of vectors, one for each stage, from fine to coarse.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            Each stage's output (B, rows, columns, width) before cells are merged; the last one normalised.
        Raises:
            ValueError: another number of channels, or another size.
        """
        grid = self.config.grids()[0]
        x = self.dropout(self.first_norm(self.patches(image))).unflatten(1, (grid, grid))
        grids = []
        for i, stage in enumerate(self.stages):
            x = self.merges[i - 1](x) if i else x
            for block in stage:
                x = block(x)
            grids.append(x)
        return [*grids[:-1], self.norm(x)]

    def forward(self, image: Tensor) -> Tensor:
        """Score the classes by the mean of the last grid; without a head, give that mean.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            (B, classes), or (B, width of the last stage).
        Raises:
            ValueError: another number of channels, or another size.
        """
        pooled = self.features(image)[-1].mean((1, 2))
        return pooled if self.head is None else self.head(pooled)
