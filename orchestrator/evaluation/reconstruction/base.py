"""What an attacker who wants images back is given, and what it answers with (SPEC E.4, R1 to R3).

It holds features and images of its own rows, and is measured on rows that it never saw. Images go in as they are
stored, (N, S, S, 3) uint8, and come back as (N, 3, S, S) pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation.attacks.base import FloatArray
from orchestrator.network import freeze
from tasks.datasets.table import ImageArray, Normalisation
from tasks.transforms import to_tensor

PIXELS = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Leaves pixels in [0, 1], as the measures take them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionInput:
    """Three disjoint sets of features with the images that they were made from, and the network if it is known."""

    train_z: FloatArray = field(repr=False)
    """(N, C, H, W), or (N, D) for features that are vectors."""
    train_x: ImageArray = field(repr=False)
    validation_z: FloatArray = field(repr=False)
    validation_x: ImageArray = field(repr=False)
    test_z: FloatArray = field(repr=False)
    test_x: ImageArray = field(repr=False)
    seed: int
    network: nn.Module | None = field(default=None, repr=False)
    """(B, 3, S, S) pixels in [0, 1] to features, frozen; None for attackers who only see features."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            z, x = getattr(self, f"{name}_z"), getattr(self, f"{name}_x")
            if len(z) != len(x) or len(x) == 0:
                raise DataError(f"the attacker's {name} rows: {len(z)} features of {len(x)} images; need one each")
            if not np.isfinite(z).all():
                raise DataError(f"the attacker's {name} features hold NaN or infinity")

    @property
    def image_size(self) -> int:
        """S."""
        return int(self.train_x.shape[1])


class Reconstructor(Protocol):
    """One way of getting images back, with its settings: a frozen dataclass, so that it can travel to a worker."""

    @property
    def name(self) -> str:
        """What tables and reports call it."""
        ...

    def run(self, data: ReconstructionInput) -> Tensor:
        """(n, 3, S, S) pixels in [0, 1]: what it makes of the first n test rows, often all. May raise."""
        ...


class PixelNetwork(nn.Module):
    """What an attacker who holds the weights runs: pixels in [0, 1] through normalisation, encoder and module."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalisation: Normalisation, *parts: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(normalisation.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation.std).view(3, 1, 1))
        self.parts = freeze(nn.Sequential(*parts))

    def forward(self, x_B3SS: Tensor) -> Tensor:
        """The feature."""
        z: Tensor = self.parts((x_B3SS - self.mean) / self.std)
        return z


def pixels(images: ImageArray) -> Tensor:
    """(N, 3, S, S) in [0, 1]."""
    return to_tensor(images, PIXELS)


def require_positive(name: str, values: Mapping[str, float]) -> None:
    """Raise `ConfigError` for a setting of ``name`` that is not above 0."""
    for setting, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}: {setting} must be above 0, got {value}")
