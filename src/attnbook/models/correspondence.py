"""The universal correspondence network: features by which the same point of two images is found again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.mechanisms import convolutional_spatial_transformer, soft_match
from attnbook.models.count import linear
from attnbook.shapes import check_count, check_tensor, mismatch, tensor_shape


@dataclass(frozen=True)
class CorrespondenceConfig:
    """The shape of a :class:`CorrespondenceNetwork`.

    Attributes:
        channels: of the images.
        width: channels of the layers between.
        features: length of the vector that describes a place.
        depth: convolutions, the first of which halves the image's sides.
        transformer: turn and scale each patch before the last convolution.
    """

    channels: int
    width: int
    features: int
    depth: int = 3
    transformer: bool = True

    def __post_init__(self) -> None:
        for name in ("channels", "width", "features", "depth"):
            check_count(name, getattr(self, name))

    def num_parameters(self) -> int:
        """Count the parameters by formula; all filters are 3 × 3."""
        W = self.width
        trunk = linear(9 * self.channels, W) + (self.depth - 1) * linear(9 * W, W)
        return trunk + (linear(9 * W, 6) if self.transformer else 0) + linear(9 * W, self.features)


def read_at(features: Tensor, points: Tensor) -> Tensor:
    """Read a feature map between its places, bilinearly.

    Args:
        features: (B, C, H, W).
        points: (B, N, 2), x before y, in the map's pixels counted from 0.
    Returns:
        (B, N, C); 0 outside.
    """
    height, width = features.shape[2:]
    scale = points.new_tensor([width, height])
    grid = (2 * points + 1) / scale - 1  # −1 and 1 are the outer edges of the first and the last pixel
    read = nn.functional.grid_sample(features, grid[:, None], align_corners=False)  # (B, C, 1, N)
    return read[:, :, 0].transpose(1, 2)


class CorrespondenceNetwork(nn.Module):
    """Describe every place of an image so that the same point of another is nearest ({cite}`choy2016`).

    A fully convolutional network, its last convolution over patches that a spatial transformer has put in a frame of
    their own, and features of length 1. Differs from the paper: a few convolutions, made here, where it takes GoogLeNet
    to inception 4a and a stride of 4; and matches are read off by a soft argmax rather than the nearest neighbour.

    Args:
        config: its shape.
    """

    def __init__(self, config: CorrespondenceConfig):
        super().__init__()
        self.config = config
        W = config.width
        layers: list[nn.Module] = []
        for i in range(config.depth):
            layers += [nn.Conv2d(W if i else config.channels, W, 3, stride=1 if i else 2, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.frame = nn.Conv2d(W, 6, 3, padding=1) if config.transformer else None
        # Over patches laid side by side the filter takes one step a patch; over the map itself, one step a place.
        step = {"stride": 3} if config.transformer else {"padding": 1}
        self.describe = nn.Conv2d(W, config.features, 3, **step)
        if self.frame is not None:  # every patch starts in the image's own frame
            nn.init.normal_(self.frame.weight, std=1e-3)
            self.frame.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])

    def features(self, image: Tensor) -> Tensor:
        """Describe all places of an image.

        Args:
            image: (B, channels, H, W).
        Returns:
            (B, F, ⌈H/2⌉, ⌈W/2⌉), each vector of length 1.
        Raises:
            ValueError: another rank or number of channels.
        """
        check_tensor("image", image, "B channels H W")
        if image.shape[1] != self.config.channels:
            raise mismatch("image", f"{self.config.channels} channels on axis 1", image)
        x = self.trunk(image)
        if self.frame is not None:
            affine = self.frame(x).unflatten(1, (2, 3))
            x = convolutional_spatial_transformer(x, affine, kernel_size=3)  # (B, W, 3·H/2, 3·W/2)
        return nn.functional.normalize(self.describe(x), dim=1)

    def forward(self, source: Tensor, target: Tensor, *, scale: float = 20.0) -> Tensor:
        """Say where each place of one image lies in another.

        Args:
            source: (B, channels, H, W).
            target: (B, channels, H', W').
            scale: factor of the cosines; the larger, the nearer to the nearest neighbour.
        Returns:
            (B, 2, ⌈H/2⌉, ⌈W/2⌉): x and y in the target's feature map.
        """
        return soft_match(self.features(source), self.features(target), scale=scale)

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        points: Tensor,
        matches: Tensor,
        *,
        margin: float = 1.0,
        radius: float = 1.5,
    ) -> Tensor:
        """Return the correspondence contrastive loss ({cite}`choy2016`, eq. 1) with the hardest negatives.

        A point and its match are drawn together; a point and the place that looks most like it, but lies further than
        the radius from the match, are pushed apart to the margin.

        Args:
            source: (B, channels, H, W).
            target: (B, channels, H', W').
            points: (B, N, 2), x and y in the source's feature map (half the image's pixels), float.
            matches: (B, N, 2), where they lie in the target's feature map.
            margin: distance of features beyond which a negative is far enough.
            radius: distance, in the feature map, within which a place counts as the match.
        Returns:
            Scalar.
        Raises:
            ValueError: shapes that do not match, a radius that leaves no place.
        """
        check_tensor("points", points, "B N 2")
        if points.shape[0] != len(source) or points.shape[2] != 2:
            raise mismatch("points", f"shape ({len(source)}, N, 2)", tensor_shape(points))
        if check_tensor("matches", matches, "B N 2").shape != points.shape:
            raise mismatch("matches", f"shape {tuple(points.shape)}, that of points", tensor_shape(matches))
        found = self.features(target)
        height, width = found.shape[2:]
        own, other = read_at(self.features(source), points), read_at(found, matches)  # (B, N, F)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([x, y], -1).flatten(0, 1).to(matches)  # (H·W, 2)
        near = torch.cdist(matches, places.expand(len(matches), -1, -1)) <= radius  # (B, N, H·W)
        if near.all(-1).any():
            raise mismatch("radius", "a distance that some place of the target exceeds", radius)
        likeness = own @ found.flatten(2)  # (B, N, H·W), cosines
        hardest = likeness.masked_fill(near, -torch.inf).amax(-1)
        apart = (2 - 2 * hardest).clamp(min=1e-12).sqrt()  # of vectors of length 1
        return 0.5 * ((own - other).square().sum(-1) + (margin - apart).clamp(min=0).square()).mean()
