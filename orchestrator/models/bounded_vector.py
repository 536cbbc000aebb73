"""V_i: what makes short vectors of known power out of a map, as a bounded feature needs them (SPEC E.7).

Axes: B examples, C channels, H and W of a map, D dimensions of the vector.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from orchestrator.privacy.bounded.channel import power_normalise

MAX_WIDTH: Final = 128
"""Of the convolutions: behind late splits more would outweigh the encoder."""
_MAX_GROUPS: Final = 8
_LEAST_CHANNELS: Final = 4
"""Of a group: a single channel of a 1x1 map, normalised by itself, would be constant."""
_POOLED_SIDE: Final = 2
_SMALLEST_HALVED: Final = 4
"""Smaller maps are not halved: on a 2x2 map that would leave one cell."""


class BoundedVector(nn.Module):
    """(B, C, H, W) to s of (B, D, 1, 1), with ||s||^2 = D for every example and any weights."""

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__()
        width = min(channels, MAX_WIDTH)
        self.layers = nn.Sequential(
            *_convolution(channels, width),
            *_convolution(width, width),
            nn.AdaptiveAvgPool2d(_POOLED_SIDE),
            nn.Flatten(),
            _centred(nn.Linear(_POOLED_SIDE**2 * width, dimensions)),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """s. Raises `NonFiniteFeatureError` if the module has diverged."""
        self._halve(min(x_BCHW.shape[-2:]))
        return power_normalise(self.layers(x_BCHW))[:, :, None, None]

    def _halve(self, side: int) -> None:
        """Convolutions of stride 2 where the map is large enough.

        They stay plain `nn.Conv2d`, whose per-example gradients are known, with the stride as an attribute.
        """
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                stride = 2 if side >= _SMALLEST_HALVED else 1
                layer.stride, side = (stride, stride), -(-side // stride)


class BoundedMap(nn.Module):
    """(B, C, H, W) to s of (B, D, side, side): ||s||^2 = D in every cell, for every example and any weights.

    What a cell's vector tells may be of the whole image: its power is bounded, and not what it has seen.
    """

    def __init__(self, channels: int, dimensions: int, side: int) -> None:
        super().__init__()
        width = min(channels, MAX_WIDTH)
        self.layers = nn.Sequential(
            *_convolution(channels, width),
            nn.AdaptiveAvgPool2d(side),
            *_convolution(width, width),
            nn.Conv2d(width, dimensions, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """s. Raises `NonFiniteFeatureError` if the module has diverged."""
        return power_normalise(self.layers(x_BCHW))


def _convolution(channels: int, width: int) -> tuple[nn.Module, ...]:
    """3x3, normalised per example, rectified."""
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return convolution, nn.GroupNorm(_groups(width), width), nn.ReLU()


@torch.no_grad()
def _centred(layer: nn.Linear) -> nn.Linear:
    """The last layer, with weights that begin with a mean of zero for each output.

    What comes in is rectified, so most of it is the same for every image, and power that goes there tells nothing: with
    rows of any mean, a tenth to a fifth of the power of s would differ from image to image at first.
    """
    layer.weight -= layer.weight.mean(dim=1, keepdim=True)
    return layer


def _groups(width: int) -> int:
    """The most groups of equal size, none too small."""
    fitting = [n for n in range(1, _MAX_GROUPS + 1) if width % n == 0 and width // n >= _LEAST_CHANNELS]
    return max(fitting, default=1)
