"""A3, a fresh convolutional network (SPEC E.4): what a feature hides from linear attackers.

Axes: B examples of a batch, C channels, H and W of the map, K classes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.evaluation.attacks.base import AttackInput, AttackResult
from orchestrator.evaluation.attacks.fitting import Fitting, answered, seeded, standardised_maps
from orchestrator.sampling import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnAttack(Fitting):
    """Three convolutions with GroupNorm, or the rest of a backbone, trained from scratch on standardised channels."""

    name: str = "cnn"
    backbone: str | None = None
    """None: the small network. Else the backbone whose remaining children are trained, as a tenant's head would be."""
    split_index: int = 6
    """Where that backbone was cut."""
    width: int = 64
    dropout: float = 0.3

    def __post_init__(self) -> None:
        Fitting.__post_init__(self)  # super() does not work in a dataclass with slots
        self.check_count("width")

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        started = time.perf_counter()
        train_z, validation_z, test_z = standardised_maps(data)
        shape = (train_z.shape[1], train_z.shape[2], train_z.shape[3])
        with seeded(data.seed, data.device):
            network = self._network(shape, data.n_classes, data.seed).to(data.device)
            best = self.fit(network, data, train_z, validation_z)
        return answered(self.name, data, network, best, test_z, started=started)

    def _network(self, shape: tuple[int, int, int], n_classes: int, seed: int) -> nn.Module:
        if self.backbone is None:
            return small_cnn(shape, n_classes, width=self.width, dropout=self.dropout)
        from orchestrator.models.heads import HeadConfig, build_head

        config = HeadConfig(
            kind="backbone",
            backbone=self.backbone,
            split_index=self.split_index,
            n_outputs=n_classes,
            feature_shape=shape,
        )
        return build_head(config, seed=derive_seed(seed, "backbone"))


def small_cnn(shape: tuple[int, int, int], n_classes: int, *, width: int, dropout: float) -> nn.Sequential:
    """``z (B, C, H, W) -> logits (B, K)``: convolutions that halve the map while a side is above 4.

    Up to 2x2 cells are kept for the last layer: where something is in the map may be what gives it away.
    """
    channels, *sides = shape
    layers: list[nn.Module] = [_WithSize()]
    channels += 1
    for out in (width, 2 * width, 2 * width):
        stride = 2 if max(sides) > 4 else 1
        kernel = 3 if max(sides) > 1 else 1
        convolution = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2)
        channels, sides = out, [math.ceil(side / stride) for side in sides]
        layers += [convolution, nn.GroupNorm(_groups(out, sides[0] * sides[1]), out), nn.ReLU()]
    kept = tuple(min(2, side) for side in sides)
    last = nn.Linear(channels * kept[0] * kept[1], n_classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(kept), nn.Flatten(), nn.Dropout(dropout), last)


class _WithSize(nn.Module):
    """Adds a channel that holds the log power of the example, which the normalisation further on would take away."""

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, C + 1, H, W)."""
        power = z_BCHW.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-6).log()
        return torch.cat([z_BCHW, power.expand(-1, 1, *z_BCHW.shape[2:])], dim=1)


def _groups(channels: int, cells: int) -> int:
    """At most 8, of at least 32 values each: normalised over a handful of values, little but their order is left."""
    return next((n for n in (8, 4, 2) if channels % n == 0 and channels // n * cells >= 32), 1)
