"""A small Aurora: fields of the atmosphere, forecast by a Perceiver over levels and windows in three dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.layers import FeedForward, MultiHeadAttention, TransformerBlock, make_norm
from attnbook.models.count import block, linear, network
from attnbook.shapes import check_count, check_probability, check_tensor, mismatch, tensor_shape

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class AuroraConfig:
    """The shape of an :class:`Aurora`.

    Attributes:
        surface: variables known at the surface.
        atmosphere: variables known at every level.
        levels: pressures at which they are known, in hPa.
        grid: rows (latitudes) and columns (longitudes).
        patch: sides of a patch, in points of the grid.
        latents: levels that the encoder makes of the atmosphere's.
        width: E.
        depth: blocks of the backbone; every second one has shifted windows.
        num_heads: H.
        window: levels, rows and columns (of patches) of a window; the surface counts as a level.
        hidden: width of the feed-forward networks; 4E by default.
        dropout: of the weights and what each part adds.
    """

    surface: int
    atmosphere: int
    levels: tuple[float, ...]
    grid: tuple[int, int]
    patch: int
    latents: int
    width: int
    depth: int
    num_heads: int
    window: Sizes = (2, 2, 2)
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("surface", "atmosphere", "patch", "latents", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        if check_count("width", self.width, least=2) % 2:
            raise mismatch("width", "an even integer", self.width)
        check_probability("dropout", self.dropout)
        if not self.levels or min(self.levels) <= 0:
            raise mismatch("levels", "at least one pressure, all of them > 0", self.levels)
        if any(side % self.patch for side in self.grid):
            raise mismatch("grid", f"multiples of patch = {self.patch}", self.grid)
        for size, part in zip(self.places, self.window, strict=True):
            if check_count("window", part) > size or size % part:
                raise mismatch("window", f"divisors of {self.places}, the levels, rows and columns", self.window)

    @property
    def places(self) -> Sizes:
        """Levels, rows and columns of the backbone's grid of patches."""
        return self.latents + 1, self.grid[0] // self.patch, self.grid[1] // self.patch

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E, area, (_, rows, columns) = self.width, self.patch**2, self.places
        hidden = self.hidden or 4 * E
        perceiver = 4 * linear(E, E) + network([E, hidden, E]) + 6 * E
        ends = sum(linear(n * area, E) + linear(E, n * area) for n in (self.surface, self.atmosphere))
        tables = (self.latents + 1 + rows * columns) * E  # latents, the surface's mark, places
        return ends + tables + 2 * linear(E, E) + 2 * perceiver + self.depth * block(E, self.hidden) + 2 * E


def level_features(levels: Tensor, width: int) -> Tensor:
    """Describe pressures by sines and cosines of their logarithms, of wavelengths from 0.01 to 10.

    Args:
        levels: (C,), in hPa.
        width: E, even.
    Returns:
        (C, E).
    """
    wavelengths = torch.logspace(-2, 1, width // 2, device=levels.device, dtype=levels.dtype)
    angles = 2 * torch.pi * levels.log()[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], -1)


def to_windows(x: Tensor, window: Sizes) -> Tensor:
    """Cut a volume into windows: (B, C, R, L, E) → (B · number of windows, positions of a window, E).

    Args:
        x: (B, C, R, L, E): levels, rows, columns.
        window: sizes along these three, divisors of theirs.
    """
    for axis, size in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def from_windows(x: Tensor, window: Sizes, places: Sizes) -> Tensor:
    """Put windows together again: the inverse of :func:`to_windows`.

    Args:
        x: (B · number of windows, positions of a window, E).
        window: sizes of a window.
        places: levels, rows and columns of the volume.
    """
    counts = [size // part for size, part in zip(places, window, strict=True)]
    x = x.unflatten(1, window).unflatten(0, (-1, *counts))  # (B, c, r, l, wc, wr, wl, E)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def shifted_mask(places: Sizes, window: Sizes, shift: Sizes) -> Tensor:
    """Say who may see whom when windows are shifted and what leaves at one end comes back at the other.

    Levels and rows that were brought together over the ends must not meet: the top of the atmosphere is not next to the
    ground, nor one pole to the other. Columns may, as the earth is round.

    Args:
        places: levels, rows and columns.
        window: sizes of a window.
        shift: by how much the volume was rolled back.
    Returns:
        (number of windows, positions, positions), bool; True = may attend.
    """
    region = torch.zeros(places)
    for axis in (0, 1):
        came_round = torch.arange(places[axis]) >= places[axis] - shift[axis]
        region += 2**axis * came_round.view([-1 if i == axis else 1 for i in range(3)])
    region = to_windows(region[None, ..., None], window)  # (n, positions, 1)
    return region == region.mT


class Resampler(nn.Module):
    """Let a few vectors read others: cross-attention and a feed-forward network, each added ({cite}`jaegle2021`).

    Args:
        width: E.
        num_heads: H.
        hidden: width of the feed-forward network; 4E by default.
        dropout: of the weights.
    """

    def __init__(self, width: int, num_heads: int, *, hidden: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.attention = MultiHeadAttention(width, num_heads, dropout=dropout)
        self.query_norm, self.memory_norm = make_norm("layer", width), make_norm("layer", width)
        self.feed_forward = FeedForward(width, hidden)
        self.feed_forward_norm = make_norm("layer", width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Update queries (B, M, E) by what they find in a memory (B, S, E)."""
        x = queries + self.attention(self.query_norm(queries), self.memory_norm(memory))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Aurora(nn.Module):
    """Forecast the atmosphere one step ahead ({cite}`bodnar2025`), in small.

    At each patch of the map, learned vectors read the levels of the atmosphere, which say their pressures: a Perceiver
    makes a fixed number of latent levels of however many there are. With the surface they form a volume, which a
    backbone of attention in windows transforms, every second layer with windows shifted by half ({cite}`liu2021`, in
    three dimensions); columns go around the earth. A second Perceiver reads the levels back.

    Differs from the paper: one resolution in the backbone, where it has three and halves and doubles them; one state as
    input, where it has two; no static variables, nor encodings of latitude, area and time, but a learned vector for
    each place; pre-norm; and the model predicts the change.

    Args:
        config: its shape.
    """

    def __init__(self, config: AuroraConfig):
        super().__init__()
        self.config = config
        E, area, (_, rows, columns) = config.width, config.patch**2, config.places
        self.register_buffer("pressures", level_features(torch.tensor(config.levels), E), persistent=False)
        self.embed_surface = nn.Linear(config.surface * area, E)
        self.embed_levels = nn.Linear(config.atmosphere * area, E)
        self.embed_pressure, self.ask_pressure = nn.Linear(E, E), nn.Linear(E, E)
        self.latents = nn.Parameter(torch.empty(config.latents, E))
        self.ground = nn.Parameter(torch.empty(E))
        self.position = nn.Parameter(torch.empty(rows * columns, E))
        options = {"hidden": config.hidden, "dropout": config.dropout}
        self.encoder = Resampler(E, config.num_heads, **options)
        self.blocks = nn.ModuleList(TransformerBlock(E, config.num_heads, **options) for _ in range(config.depth))
        self.norm = make_norm("layer", E)
        self.decoder = Resampler(E, config.num_heads, **options)
        self.read_surface = nn.Linear(E, config.surface * area)
        self.read_levels = nn.Linear(E, config.atmosphere * area)
        for table in (self.latents, self.ground, self.position):
            nn.init.normal_(table, std=0.02)
        # Half a window along each axis; an axis that one window spans is not shifted.
        self.shift = tuple(
            part // 2 if part < size else 0 for part, size in zip(config.window, config.places, strict=True)
        )
        mask = shifted_mask(config.places, config.window, self.shift)
        self.register_buffer("mask", mask, persistent=False)

    def _patches(self, fields: Tensor) -> Tensor:
        """Cut fields (…, V, rows, columns) into patches (…, N, V · area)."""
        p = self.config.patch
        x = fields.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # (…, V, r, p, c, p)
        return x.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)

    def _fields(self, patches: Tensor, variables: int) -> Tensor:
        """Put patches (…, N, V · area) together: (…, V, rows, columns)."""
        p, (_, rows, columns) = self.config.patch, self.config.places
        x = patches.unflatten(-2, (rows, columns)).unflatten(-1, (variables, p, p))  # (…, r, c, V, p, p)
        return x.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)

    def _backbone(self, x: Tensor) -> Tensor:
        """Transform a volume (B, C, R, L, E)."""
        config = self.config
        back = tuple(-s for s in self.shift)
        for i, layer in enumerate(self.blocks):
            shifted = i % 2 == 1
            windows = to_windows(x.roll(back, (1, 2, 3)) if shifted else x, config.window)
            mask = self.mask.repeat(len(x), 1, 1)[:, None] if shifted else None  # (B · n, 1, positions, positions)
            x = from_windows(layer(windows, attn_mask=mask), config.window, config.places)
            x = x.roll(self.shift, (1, 2, 3)) if shifted else x
        return self.norm(x)

    def forward(self, surface: Tensor, atmosphere: Tensor) -> tuple[Tensor, Tensor]:
        """Forecast one step ahead; all variables brought to mean 0 and deviation 1 beforehand.

        Args:
            surface: (B, surface variables, rows, columns).
            atmosphere: (B, atmosphere variables, levels, rows, columns).
        Returns:
            Both, one step later.
        Raises:
            ValueError: shapes that do not match.
        """
        config = self.config
        batch = check_tensor("surface", surface, "B V rows columns").shape[0]
        wanted = (batch, config.surface, *config.grid)
        if surface.shape != wanted:
            raise mismatch("surface", f"shape {wanted}", tensor_shape(surface))
        wanted = (batch, config.atmosphere, len(config.levels), *config.grid)
        if check_tensor("atmosphere", atmosphere, "B V C rows columns").shape != wanted:
            raise mismatch("atmosphere", f"shape {wanted}", tensor_shape(atmosphere))
        levels = self.embed_levels(self._patches(atmosphere.transpose(1, 2)))  # (B, C, N, E)
        levels = levels + self.embed_pressure(self.pressures)[:, None] + self.position
        columns = levels.transpose(1, 2).flatten(0, 1)  # (B·N, C, E): one column of air a patch
        latents = self.encoder(self.latents.expand(len(columns), -1, -1), columns)  # (B·N, M, E)
        latents = latents.unflatten(0, (batch, -1)).transpose(1, 2)  # (B, M, N, E)
        ground = self.embed_surface(self._patches(surface)) + self.ground + self.position  # (B, N, E)
        x = torch.cat([ground[:, None], latents], 1).unflatten(2, config.places[1:])  # (B, 1 + M, R, L, E)
        x = self._backbone(x).flatten(2, 3)
        ground, latents = x[:, 0], x[:, 1:].transpose(1, 2).flatten(0, 1)
        asked = self.ask_pressure(self.pressures).expand(len(latents), -1, -1)
        levels = self.decoder(asked, latents).unflatten(0, (batch, -1)).transpose(1, 2)  # (B, C, N, E)
        change = self._fields(self.read_levels(levels), config.atmosphere).transpose(1, 2)
        return surface + self._fields(self.read_surface(ground), config.surface), atmosphere + change

    def roll_out(self, surface: Tensor, atmosphere: Tensor, *, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Forecast several steps, each from the one before.

        Args:
            surface: as for :meth:`forward`.
            atmosphere: likewise.
            steps: how many.
        Returns:
            The states after each step.
        Raises:
            ValueError: steps below 1, and as for :meth:`forward`.
        """
        states = []
        for _ in range(check_count("steps", steps)):
            surface, atmosphere = self(surface, atmosphere)
            states.append((surface, atmosphere))
        return states
