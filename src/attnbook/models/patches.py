"""Patches and windows: how a grid of pixels becomes a sequence, and a large grid many small ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnbook.positions import sinusoidal
from attnbook.shapes import check_count, check_tensor, mismatch, tensor_shape


class PatchEmbedding(nn.Module):
    """Cut an image into square patches and project each: the words of a Vision Transformer ({cite}`dosovitskiy2021`).

    Args:
        channels: of the image.
        image_size: rows, and columns.
        patch_size: of a patch; a divisor of the image's.
        width: E.
        bias: give the projection a bias.
    Raises:
        ValueError: sizes below 1, a patch size that does not divide the image's.
    """

    def __init__(self, channels: int, image_size: int, patch_size: int, width: int, *, bias: bool = True):
        super().__init__()
        check_count("channels", channels)
        if check_count("image_size", image_size) % check_count("patch_size", patch_size):
            raise mismatch("patch_size", f"a divisor of image_size = {image_size}", patch_size)
        self.image_size, self.grid = image_size, image_size // patch_size
        # A convolution whose kernel and stride are one patch is one linear map for every patch.
        self.projection = nn.Conv2d(channels, check_count("width", width), patch_size, stride=patch_size, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the patches, row by row.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            (B, N, E), N = (rows / patch_size)².
        Raises:
            ValueError: another number of channels, or another size.
        """
        check_image(image, self.projection.in_channels, self.image_size)
        return self.projection(image).flatten(2).transpose(1, 2)


def check_image(image: Tensor, channels: int, size: int | None = None) -> Tensor:
    """Check that an argument is a batch of images.

    Args:
        image: what the caller passed.
        channels: that it should have.
        size: rows and columns that it should have; any by default.
    Returns:
        The images, unchanged.
    Raises:
        ValueError: another rank, number of channels or size.
    """
    check_tensor("image", image, "B channels rows columns")
    wanted = (channels, *(image.shape[2:] if size is None else (size, size)))
    if tuple(image.shape[1:]) != wanted:
        raise mismatch("image", f"(B, channels, rows, columns) with {wanted} behind B", tensor_shape(image))
    return image


def sinusoidal_grid(rows: int, columns: int, width: int) -> Tensor:
    """Tabulate fixed positions on a grid: half of the components tell the row, half the column ({cite}`beyer2022`).

    Args:
        rows: of the grid.
        columns: of the grid.
        width: E, a multiple of 4.
    Returns:
        (rows · columns, E) float32, row by row.
    Raises:
        ValueError: a size below 1, a width that is no multiple of 4.
    """
    if check_count("width", width) % 4:
        raise mismatch("width", "a multiple of 4", width)
    by_row = sinusoidal(rows, width // 2)[:, None].expand(-1, columns, -1)
    by_column = sinusoidal(columns, width // 2).expand(rows, -1, -1)
    return torch.cat([by_row, by_column], -1).flatten(0, 1)


def partition_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """Cut a grid of any number of axes into windows that do not overlap.

    Args:
        x: (B, grid…, E).
        window: the window's size on each axis of the grid; divisors of the grid's.
    Returns:
        (B · windows, N, E), N the number of cells of a window; the windows of one grid follow each other.
    Raises:
        ValueError: another number of axes, or sizes that do not divide the grid's.
    """
    check_tensor("x", x, " ".join(["B", *(f"axis{i}" for i in range(len(window))), "E"]), dtypes=None)
    grid = tuple(x.shape[1:-1])
    if any(size % part for size, part in zip(grid, window, strict=True)):
        raise mismatch("window", f"divisors of the grid {grid}", tuple(window))
    split = [n for size, part in zip(grid, window, strict=True) for n in (size // part, part)]
    axes = len(window)
    x = x.reshape(len(x), *split, x.shape[-1])  # (B, n₁, w₁, n₂, w₂, …, E)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    return x.permute(order).reshape(-1, math.prod(window), x.shape[-1])


def merge_windows(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Put windows together again; the inverse of :func:`partition_windows`.

    Args:
        windows: (B · windows, N, E).
        window: the window's size on each axis.
        grid: the grid's.
    Returns:
        (B, grid…, E).
    """
    counts = [size // part for size, part in zip(grid, window, strict=True)]
    axes = len(window)
    x = windows.reshape(-1, *counts, *window, windows.shape[-1])
    order = [0, *(axis for i in range(axes) for axis in (1 + i, 1 + axes + i)), 2 * axes + 1]
    return x.permute(order).reshape(-1, *grid, windows.shape[-1])


def shifted_window_mask(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Tell which cells of a window were neighbours before the grid was rolled ({cite}`liu2021`, §3.2).

    Rolling by ``shift`` brings the grid's two ends together in its last windows; what was not together before may not
    attend to each other.

    Args:
        grid: its size on each axis.
        window: the window's.
        shift: by how much the grid was rolled towards its start; 0 on an axis that was not.
    Returns:
        (windows, 1, N, N) bool; True = may attend.
    """
    region = torch.zeros(tuple(grid), dtype=torch.int64)
    for axis, (size, part, by) in enumerate(zip(grid, window, shift, strict=True)):
        place = torch.arange(size)
        # The last window holds what came round from the start; without a shift there is one region only.
        name = (place >= size - part).long() + (place >= size - by).long() if by else torch.zeros_like(place)
        region = 3 * region + name.view([-1 if i == axis else 1 for i in range(len(grid))])
    region = partition_windows(region[None, ..., None], window)[..., 0]  # (windows, N)
    return region[:, None, :, None] == region[:, None, None, :]


class WindowBias(nn.Module):
    """Learn one number for each head and relative position in a window ({cite}`liu2021`, eq. 4).

    Args:
        num_heads: H.
        window: the window's size on each axis.
    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_heads: int, window: Sequence[int]):
        super().__init__()
        check_count("num_heads", num_heads)
        span = [2 * check_count("window", size) - 1 for size in window]
        self.table = nn.Parameter(torch.empty(math.prod(span), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        places = torch.cartesian_prod(*(torch.arange(size) for size in window)).view(-1, len(window))  # (N, axes)
        index = torch.zeros(len(places), len(places), dtype=torch.int64)
        for axis, size in enumerate(window):
            difference = places[:, None, axis] - places[None, :, axis]
            index = index * span[axis] + difference + size - 1
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """Return the bias (H, N, N) of a window's scores."""
        return self.table[self.index].movedim(-1, 0)
