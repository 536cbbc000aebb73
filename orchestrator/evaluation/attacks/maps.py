"""Features as a network takes them: maps with standardised channels. Axes: N rows, C channels, H and W of the map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.evaluation.attacks.base import FloatArray


def as_maps(z: FloatArray | Tensor) -> Tensor:
    """(N, C, H, W) float32; a vector is a 1x1 map."""
    maps = torch.as_tensor(z).float()
    return maps if maps.ndim == 4 else maps.reshape(*maps.shape[:2], 1, 1)


@dataclass(frozen=True, slots=True)
class Standardiser:
    """Every channel to mean 0 and variance 1 over the attacker's rows: a feature's scale hides nothing from it."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, z_NCHW: Tensor) -> Standardiser:
        """Constant channels keep their scale."""
        std = z_NCHW.std(dim=(0, 2, 3), keepdim=True, correction=0)
        return cls(z_NCHW.mean(dim=(0, 2, 3), keepdim=True), torch.where(std > 0, std, 1.0))

    def __call__(self, z_NCHW: Tensor) -> Tensor:
        """The same shape."""
        return (z_NCHW - self.mean) / self.std
