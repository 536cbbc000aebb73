"""ResNets that DP-SGD can train: GroupNorm instead of BatchNorm, and nothing that works in place.

Opacus's hooks reject ``out += identity`` and ``ReLU(inplace=True)``, both of which torchvision's blocks have, and
BatchNorm mixes the examples of a batch. Names and shapes of the convolutions are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from orchestrator.errors import ConfigError
from orchestrator.models.seeding import seeded
from tasks.registry import look_up

MAX_GROUPS = 32
"""Of a GroupNorm (Wu and He 2018), and what Opacus's `ModuleValidator.fix` would put in BatchNorm's place."""


class OutOfPlaceBasicBlock(BasicBlock):  # type: ignore[misc] # torchvision has no annotations
    """torchvision's block of two 3x3 convolutions, with the sum out of place."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out + identity)
        return result


class OutOfPlaceBottleneck(Bottleneck):  # type: ignore[misc] # torchvision has no annotations
    """torchvision's block of a 1x1, a 3x3 and a 1x1 convolution, with the sum out of place."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out + identity)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Which ResNet of He et al. 2016."""

    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    """Blocks in layer1 to layer4."""

    @property
    def expansion(self) -> int:
        """Output channels of a block, per channel of its 3x3 convolution."""
        return int(self.block.expansion)


BACKBONES: Mapping[str, Architecture] = {
    "resnet18": Architecture(block=OutOfPlaceBasicBlock, layers=(2, 2, 2, 2)),
    "resnet34": Architecture(block=OutOfPlaceBasicBlock, layers=(3, 4, 6, 3)),
    "resnet50": Architecture(block=OutOfPlaceBottleneck, layers=(3, 4, 6, 3)),
}


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of every backbone here: per example, so it never mixes two images."""
    return nn.GroupNorm(min(MAX_GROUPS, channels), channels)


def build_backbone(name: str, *, n_outputs: int, seed: int) -> ResNet:
    """A freshly initialised ResNet: (B, 3, S, S) images to (B, n_outputs).

    All weights but the last layer's are the same for every ``n_outputs``. The process's random state is not touched.
    Raises `UnknownNameError` for a name that is none of `BACKBONES`.
    """
    architecture = look_up(BACKBONES, "backbone", name)
    if n_outputs < 1:
        raise ConfigError(f"a backbone needs at least one output, got {n_outputs}")
    with seeded(seed):
        network = ResNet(architecture.block, list(architecture.layers), num_classes=1, norm_layer=group_norm)
        network.fc = nn.Linear(network.fc.in_features, n_outputs)
    for layer in network.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return network
