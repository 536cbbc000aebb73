"""Where a backbone is cut in two: the producer's encoder in front, the tenants' heads behind.

A backbone's children are conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool, fc; the encoder is the
first ``split_index`` of them. Axes of a feature: C channels, H and W.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from orchestrator.errors import ConfigError
from orchestrator.models.resnet import BACKBONES, build_backbone
from tasks.registry import look_up

MIN_SPLIT = 1
MAX_SPLIT = 9
"""After the average pool: the head is then the last linear layer alone."""
MIN_IMAGE_SIZE = 8
"""Of up to 4 pixels the stem leaves one position, where a GroupNorm of 64 channels in 32 groups has two numbers a group
and normalises them to a pair of signs. 8 is the next power of two."""

# After child k: how often the side has been halved (rounding up), channels before a block's expansion.
_HALVINGS = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 4, 8: 5}
_WIDTH = {5: 64, 6: 128, 7: 256, 8: 512, 9: 512}
_STEM_CHANNELS = 64
_PAPER_IMAGE_SIZE = 64


def build_encoder(backbone: str, split_index: int, *, seed: int) -> nn.Sequential:
    """The first ``split_index`` children of a freshly initialised backbone, under torchvision's names.

    With the same seed, encoder and "backbone" head are the two halves of one `build_backbone`.
    Raises `UnknownNameError` for the backbone, `ConfigError` for the split index.
    """
    check_split(backbone, split_index)
    children = list(build_backbone(backbone, n_outputs=1, seed=seed).named_children())
    return nn.Sequential(OrderedDict(children[:split_index]))


def feature_shape(backbone: str, split_index: int, image_size: int) -> tuple[int, int, int]:
    """(C, H, W) of the encoder's output for square images of ``image_size`` pixels a side. Nothing is built or run.

    Raises `UnknownNameError` for the backbone, `ConfigError` for the split index or images below `MIN_IMAGE_SIZE`.
    """
    check_split(backbone, split_index)
    if image_size < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"images of {image_size}x{image_size} pixels are too small for {backbone}: "
            f"use an image size of at least {MIN_IMAGE_SIZE}"
        )
    return _shape(backbone, split_index, image_size)


def check_split(backbone: str, split_index: int) -> None:
    """Raise `UnknownNameError` or `ConfigError` unless the backbone is known and can be split there."""
    look_up(BACKBONES, "backbone", backbone)
    if not MIN_SPLIT <= split_index <= MAX_SPLIT:
        useful = ", ".join(
            f"{k} gives {'x'.join(map(str, _shape(backbone, k, _PAPER_IMAGE_SIZE)))}" for k in range(5, MAX_SPLIT + 1)
        )
        raise ConfigError(
            f"the split index of {backbone} must be between {MIN_SPLIT} and {MAX_SPLIT}, got {split_index}; "
            f"for images of {_PAPER_IMAGE_SIZE}x{_PAPER_IMAGE_SIZE}, {useful}"
        )


def _shape(backbone: str, split_index: int, image_size: int) -> tuple[int, int, int]:
    width = _WIDTH.get(split_index)
    channels = _STEM_CHANNELS if width is None else width * BACKBONES[backbone].expansion
    # A convolution or pool of stride 2, padded by half its kernel, gives ceil(side / 2); ceilings compose.
    side = 1 if split_index == MAX_SPLIT else -(-image_size // 2 ** _HALVINGS[split_index])
    return channels, side, side
