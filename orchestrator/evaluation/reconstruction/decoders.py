"""R1's networks: from a feature back to an image. Axes: B examples, C channels, H and W of the map, S pixels a side.

An encoder halves the side n times, rounding up, so ``2**n`` times the side of its map covers the image, and what stands
over is cut off at the far edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from orchestrator.models.seeding import seeded
from tasks.registry import look_up

FeatureShape = tuple[int, int, int]
"""(C, H, W)."""


def build_decoder(kind: str, shape: FeatureShape, *, mean_image: Tensor, width: int, seed: int) -> nn.Module:
    """A freshly initialised decoder, (B, C, H, W) to (B, 3, S, S). Raises `UnknownNameError` for its kind.

    ``mean_image`` (3, S, S) is what all but the paper's kind answer with before they have learned anything.
    """
    builder = look_up(DECODERS, "decoder", kind)
    with seeded(seed):
        return builder(shape, mean_image, width)


class TransposedDecoder(nn.Module):
    """Transposed convolutions with ReLU between, and a sigmoid: the kind of decoder of the paper's Figure 8b.

    The paper draws it without sizes; the number of stages follows from the feature, the widths are ours.
    """

    def __init__(self, shape: FeatureShape, mean_image: Tensor, width: int) -> None:
        super().__init__()
        self.size = mean_image.shape[-1]
        channels, layers = shape[0], list[nn.Module]()
        for _ in range(halvings(shape, self.size)):
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, 3, S, S)."""
        x: Tensor = self.layers(z_BCHW)
        return x[..., : self.size, : self.size]


class ResidualDecoder(nn.Module):
    """``mean image + linear(z) + body(z)``, both parts zero at first.

    The mean image makes a feature that tells nothing cost the attacker nothing; the linear part undoes whatever a
    linear map did, and the body learns the rest.
    """

    def __init__(self, shape: FeatureShape, mean_image: Tensor, body: nn.Sequential) -> None:
        super().__init__()
        self.register_buffer("mean_image", mean_image.clone())
        factor = 2 ** halvings(shape, mean_image.shape[-1])
        self.linear = nn.Sequential(nn.Conv2d(shape[0], 3 * factor**2, 1), nn.PixelShuffle(factor))
        self.body = body
        for last in (self.linear[0], _last_convolution(body)):
            assert isinstance(last, nn.Conv2d) and last.bias is not None
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, 3, S, S)."""
        mean_image = self.get_buffer("mean_image")
        height, width = mean_image.shape[-2:]
        x: Tensor = mean_image + (self.linear(z_BCHW) + self.body(z_BCHW))[..., :height, :width]
        return x


def halvings(shape: FeatureShape, image_size: int) -> int:
    """n, such that ``2**n`` times the map's side covers the image."""
    return max(0, math.ceil(math.log2(image_size / max(shape[1:]))))


def _transposed(shape: FeatureShape, mean_image: Tensor, width: int) -> nn.Module:
    return TransposedDecoder(shape, mean_image, width)


def _pixel_shuffle(shape: FeatureShape, mean_image: Tensor, width: int) -> nn.Module:
    """Three convolutions at the feature's own resolution, the last of which holds every pixel of its cell."""
    factor = 2 ** halvings(shape, mean_image.shape[-1])
    body = nn.Sequential(
        *_convolution(shape[0], width),
        *_convolution(width, width),
        nn.Conv2d(width, 3 * factor**2, 3, padding=1),
        nn.PixelShuffle(factor),
    )
    return ResidualDecoder(shape, mean_image, body)


def _staged(shape: FeatureShape, mean_image: Tensor, width: int) -> nn.Module:
    """Twice the resolution at a time, with fewer channels from stage to stage."""
    layers: list[nn.Module] = list(_convolution(shape[0], width))
    for _ in range(halvings(shape, mean_image.shape[-1])):
        narrower = max(16, width // 2)
        layers += [nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
        layers += _convolution(narrower, narrower)
        width = narrower
    return ResidualDecoder(shape, mean_image, nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1)))


def _convolution(channels: int, out: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()


def _last_convolution(body: nn.Sequential) -> nn.Module:
    return [layer for layer in body if isinstance(layer, nn.Conv2d)][-1]


DECODERS: Mapping[str, Callable[[FeatureShape, Tensor, int], nn.Module]] = {
    "transposed": _transposed,
    "pixel_shuffle": _pixel_shuffle,
    "staged": _staged,
}


@torch.no_grad()
def decode(decoder: nn.Module, z_NCHW: Tensor, *, batch_size: int = 256) -> Tensor:
    """(N, 3, S, S) pixels in [0, 1], on the CPU."""
    parts = [decoder(z_NCHW[i : i + batch_size]).clamp(0, 1).cpu() for i in range(0, len(z_NCHW), batch_size)]
    return torch.cat(parts)
