"""A small convolutional network: the baseline against which attention to images is measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attnbook.models.patches import check_image
from attnbook.shapes import check_count, mismatch


@dataclass(frozen=True)
class ConvNetConfig:
    """The shape of a :class:`ConvNet`.

    Attributes:
        channels: of the image.
        num_classes: of the head.
        widths: number of features of each stage; the image is halved between stages.
        dropout: of the pooled features.
    """

    channels: int
    num_classes: int
    widths: tuple[int, ...] = (32, 64, 128)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count("channels", self.channels)
        check_count("num_classes", self.num_classes)
        if not self.widths:
            raise mismatch("widths", "at least one stage", self.widths)
        for width in self.widths:
            check_count("widths", width)

    def num_parameters(self) -> int:
        """Count the parameters by formula: two convolutions and two norms a stage, and the head."""
        before = (self.channels, *self.widths)
        count = sum(9 * (a * b + b * b) + 4 * b for a, b in zip(before, self.widths, strict=False))
        return count + (self.widths[-1] + 1) * self.num_classes


class ConvNet(nn.Module):
    """Classify an image by 3 × 3 convolutions, two a stage, with pooling between ({cite}`simonyan2015`, §2.1).

    Differs from the paper: each convolution is followed by a batch norm ({cite}`ioffe2015`), and the mean over the
    image takes the place of its dense layers. Batch norm ties the images of a batch together in training.

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: ConvNetConfig):
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList()
        before = config.channels
        for width in config.widths:
            layers = []
            for source in (before, width):
                layers += [nn.Conv2d(source, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))
            before = width
        self.head = nn.Linear(before, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, image: Tensor) -> Tensor:
        """Turn an image into a coarse grid of features.

        Args:
            image: (B, channels, rows, columns), large enough to be halved between stages.
        Returns:
            (B, features, rows / 2^(stages − 1), columns / 2^(stages − 1)), rounded down.
        Raises:
            ValueError: another number of channels, or too small an image.
        """
        x = check_image(image, self.config.channels)
        least = 2 ** (len(self.stages) - 1)
        if min(image.shape[2:]) < least:
            raise mismatch("image", f"at least {least} rows and columns", image)
        for i, stage in enumerate(self.stages):
            x = stage(nn.functional.max_pool2d(x, 2) if i else x)
        return x

    def forward(self, image: Tensor) -> Tensor:
        """Score the classes.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            (B, classes).
        Raises:
            ValueError: another number of channels, or too small an image.
        """
        return self.head(self.dropout(self.features(image).mean((2, 3))))
