"""The Vision Transformer: an image as a sequence of patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbook.layers import ACTIVATIONS, GATED, TransformerBlock, make_norm, run_blocks
from attnbook.models.patches import PatchEmbedding, sinusoidal_grid
from attnbook.shapes import check_choice, check_count, check_tensor, mismatch

POSITIONS = ("learned", "sinusoidal")
POOLS = ("class", "mean")


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a :class:`VisionTransformer`. The defaults are the paper's manner ({cite}`dosovitskiy2021`).

    Attributes:
        image_size: rows, and columns.
        patch_size: of a patch; a divisor of the image's.
        channels: of the image.
        width: E.
        depth: number of blocks.
        num_heads: H.
        num_classes: of the head; None for no head.
        hidden: width of the feed-forward networks; 4E by default.
        pool: what the head sees: "class", a token of its own, or "mean", the mean of the patches ({cite}`beyer2022`).
        position: "learned", or "sinusoidal" on the grid, fixed.
        norm_eps: what the norms add to the variance.
        activation: as for :class:`attnbook.layers.FeedForward`.
        patch_bias: give the patches' projection a bias.
        first_norm: normalise the embedded patches before the first block, as CLIP does.
        dropout: of the embeddings, the weights and what each part adds.
        init_std: standard deviation of the first weights.
    """

    image_size: int
    patch_size: int
    channels: int
    width: int
    depth: int
    num_heads: int
    num_classes: int | None = None
    hidden: int | None = None
    pool: str = "class"
    position: str = "learned"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    patch_bias: bool = True
    first_norm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "width", "depth", "num_heads"):
            check_count(name, getattr(self, name))
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
        check_choice("pool", self.pool, POOLS)
        check_choice("position", self.position, POSITIONS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.image_size % self.patch_size:
            raise mismatch("patch_size", f"a divisor of image_size = {self.image_size}", self.patch_size)

    @property
    def num_patches(self) -> int:
        """N, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E, hidden = self.width, self.hidden or 4 * self.width
        up = 2 if self.activation in GATED else 1
        token = int(self.pool == "class")
        block = 4 * (E * E + E) + (up + 1) * E * hidden + up * hidden + E + 4 * E
        count = self.channels * self.patch_size**2 * E + (E if self.patch_bias else 0) + token * E
        count += (self.num_patches + token) * E if self.position == "learned" else 0
        count += self.depth * block + 2 * E + (2 * E if self.first_norm else 0)
        return count + ((E + 1) * self.num_classes if self.num_classes else 0)


class VisionTransformer(nn.Module):
    """Classify an image with a Transformer over its patches ({cite}`dosovitskiy2021`).

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.patches = PatchEmbedding(config.channels, config.image_size, config.patch_size, E, bias=config.patch_bias)
        self.token = nn.Parameter(torch.empty(1, 1, E)) if config.pool == "class" else None
        positions = config.num_patches + (self.token is not None)
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(positions, E))
        else:
            table = sinusoidal_grid(self.patches.grid, self.patches.grid, E)
            if self.token is not None:
                table = torch.cat([torch.zeros(1, E), table])  # the token stands nowhere
            self.register_buffer("position", table, persistent=False)
        self.first_norm = make_norm("layer", E, config.norm_eps) if config.first_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                E,
                config.num_heads,
                hidden=config.hidden,
                norm_eps=config.norm_eps,
                activation=config.activation,
                dropout=config.dropout,
            )
            for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E, config.norm_eps)
        self.head = nn.Linear(E, config.num_classes) if config.num_classes else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.token, self.position):
            if isinstance(table, nn.Parameter):
                nn.init.trunc_normal_(table, std=std)

    def features(self, image: Tensor, *, return_trace: bool = False) -> Any:
        """Turn an image into one vector for each patch.

        Args:
            image: (B, channels, rows, columns).
            return_trace: return what every block did, too.
        Returns:
            (B, L, E), normalised; L is N, or N + 1 with the class token in front; with return_trace also a
            :class:`attnbook.layers.Trace`.
        Raises:
            ValueError: another number of channels, or another size.
        """
        x = self.patches(image)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.first_norm(self.dropout(x + self.position))
        if return_trace:
            x, trace = run_blocks(self.blocks, x)
            return self.norm(x), trace
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def pool(self, features: Tensor) -> Tensor:
        """Summarise an image: the class token's vector, or the patches' mean.

        Args:
            features: (B, L, E), from :meth:`features`.
        Returns:
            (B, E).
        """
        check_tensor("features", features, "B L E")
        return features.mean(1) if self.token is None else features[:, 0]

    def forward(self, image: Tensor) -> Tensor:
        """Score the classes; without a head, give the image's vector.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            (B, classes), or (B, E).
        Raises:
            ValueError: another number of channels, or another size.
        """
        pooled = self.pool(self.features(image))
        return pooled if self.head is None else self.head(pooled)

    def position_similarity(self) -> Tensor:
        """Compare the patches' positions with each other by their cosine ({cite}`dosovitskiy2021`, Figure 7).

        Returns:
            (rows, columns, rows, columns) of the grid of patches: one map for each patch.
        """
        table = nn.functional.normalize(self.position[-self.config.num_patches :].detach(), dim=-1)
        return (table @ table.T).view([self.patches.grid] * 4)
