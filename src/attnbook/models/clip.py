"""CLIP: an image encoder and a text encoder that learn to agree on which text describes which image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbook.layers import TransformerBlock, make_norm
from attnbook.models.vision import VisionConfig, VisionTransformer
from attnbook.shapes import check_count, check_tensor, describe, mismatch, tensor_shape

LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class CLIPConfig:
    """The shape of a :class:`CLIP` pair.

    Attributes:
        image: of the image encoder, without a head.
        vocab_size: V of the text encoder.
        context_length: the most positions of a text.
        width: E of the text encoder.
        depth: number of its blocks.
        num_heads: H.
        end: the token that ends a text; its vector stands for the text.
        joint_width: of the space that both share.
        norm_eps: what the text encoder's norms add to the variance.
        temperature: of the similarities, at first.
        init_std: standard deviation of the text encoder's first weights.
    """

    image: VisionConfig
    vocab_size: int
    context_length: int
    width: int
    depth: int
    num_heads: int
    end: int
    joint_width: int
    norm_eps: float = 1e-5
    temperature: float = 0.07
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "width", "depth", "num_heads", "joint_width"):
            check_count(name, getattr(self, name))
        if not 0 <= self.end < self.vocab_size:
            raise mismatch("end", f"an integer in [0, {self.vocab_size - 1}]", self.end)
        if not self.temperature >= 1 / LARGEST_SCALE:
            raise mismatch("temperature", f"a number ≥ {1 / LARGEST_SCALE}", describe(self.temperature))
        if self.image.num_classes is not None:
            raise mismatch("image", "a configuration with num_classes=None", f"{self.image.num_classes} classes")

    @classmethod
    def base(cls, patch_size: int = 32) -> CLIPConfig:
        """Return the configuration of the published ViT-B models.

        Args:
            patch_size: 32 or 16.
        """
        manner = {"norm_eps": 1e-5, "patch_bias": False, "first_norm": True}
        return cls(VisionConfig(224, patch_size, 3, 768, 12, 12, **manner), 49408, 77, 512, 12, 8, 49407, 512)

    def num_parameters(self) -> int:
        """Count the parameters by formula."""
        E = self.width
        text = (self.vocab_size + self.context_length) * E + self.depth * (12 * E * E + 13 * E) + 2 * E
        return self.image.num_parameters() + text + (E + self.image.width) * self.joint_width + 1


class TextEncoder(nn.Module):
    """Read a text from left to right, and give the vector of its end ({cite}`radford2021`, §2.4).

    Args:
        config: of the pair.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        E = config.width
        self.embedding = nn.Embedding(config.vocab_size, E)
        self.position = nn.Parameter(torch.empty(config.context_length, E))
        self.blocks = nn.ModuleList(
            TransformerBlock(E, config.num_heads, norm_eps=config.norm_eps) for _ in range(config.depth)
        )
        self.norm = make_norm("layer", E, config.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.position, std=config.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read texts.

        Args:
            tokens: (B, L) integers below V; each row has the end token, and what follows its first one is not seen.
        Returns:
            (B, E).
        Raises:
            ValueError: another rank, more positions than the context length, a row without an end.
        """
        check_tensor("tokens", tokens, "B L", dtypes=(torch.int64, torch.int32))
        if tokens.shape[1] > self.config.context_length:
            raise mismatch("tokens", f"at most {self.config.context_length} positions", f"{tokens.shape[1]}")
        ends = tokens == self.config.end
        if not ends.any(1).all():
            raise mismatch("tokens", f"the end token {self.config.end} in every row", "a row without")
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, is_causal=True)
        first = ends.int().argmax(1)
        return self.norm(x[torch.arange(len(x), device=x.device), first])


class CLIP(nn.Module):
    """Put images and texts into one space, where what belongs together points the same way ({cite}`radford2021`).

    Differs from the published weights' model in GELU, which we compute as it is defined, and they as x·σ(1.702x).

    Args:
        config: its shape.
    Raises:
        ValueError: a shape that is impossible.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.image = VisionTransformer(config.image)
        self.text = TextEncoder(config)
        self.image_projection = nn.Linear(config.image.width, config.joint_width, bias=False)
        self.text_projection = nn.Linear(config.width, config.joint_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_image(self, image: Tensor) -> Tensor:
        """Place images in the joint space.

        Args:
            image: (B, channels, rows, columns).
        Returns:
            (B, joint_width), each of Euclidean length 1.
        Raises:
            ValueError: another number of channels, or another size.
        """
        return nn.functional.normalize(self.image_projection(self.image(image)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Place texts in the joint space.

        Args:
            tokens: (B, L) integers, as for :class:`TextEncoder`.
        Returns:
            (B, joint_width), each of Euclidean length 1.
        Raises:
            ValueError: as for :class:`TextEncoder`.
        """
        return nn.functional.normalize(self.text_projection(self.text(tokens)), dim=-1)

    def scale(self) -> Tensor:
        """Return what cosines are multiplied by: one over the temperature, at most 100 (their §2.5)."""
        return self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Compare every image with every text.

        Args:
            image: (B, channels, rows, columns).
            tokens: (T, L) integers.
        Returns:
            (B, T), cosines over the temperature.
        Raises:
            ValueError: as for the two encoders.
        """
        return self.scale() * self.encode_image(image) @ self.encode_text(tokens).T


def contrastive_loss(logits: Tensor) -> Tensor:
    """Ask each image for its text among all of the batch, and each text for its image ({cite}`radford2021`, Figure 3).

    Args:
        logits: (B, B), row i an image, column i its text.
    Returns:
        The mean of the two cross-entropies; ln B where nothing is known.
    Raises:
        ValueError: no square.
    """
    check_tensor("logits", logits, "B B")
    if logits.shape[0] != logits.shape[1]:
        raise mismatch("logits", "as many images as texts", tensor_shape(logits))
    own = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
