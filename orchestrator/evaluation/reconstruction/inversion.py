"""R2: the image whose feature is the given one, found by gradient descent through the encoder (SPEC E.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.maps import Standardiser, as_maps
from orchestrator.evaluation.reconstruction.base import ReconstructionInput, pixels, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimisationInversion:
    """Adam on the pixels: ``min_x ||s(f(x)) - s(z)||^2 + tv TV(x)``, s the standardisation by the attacker's rows.

    White box: it takes the weights of encoder and module, and no training. Pixels start at the mean of the attacker's
    images and are kept in [0, 1]; the learning rate falls as a cosine.
    """

    name: str = "inversion"
    images: int = 64
    """How many test rows; each takes all iterations."""
    iterations: int = 500
    learning_rate: float = 0.05
    total_variation: float = 1e-4
    """Weight of the sum of absolute differences between neighbouring pixels."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        names = ("images", "iterations", "learning_rate", "batch_size")
        require_positive(self.name, {name: getattr(self, name) for name in names})

    def run(self, data: ReconstructionInput) -> Tensor:
        """(min(N, images), 3, S, S)."""
        if data.network is None:
            raise DataError(f"{self.name} needs the encoder: it is an attack with knowledge of the weights")
        network = data.network.to(data.device).eval()
        standardise = Standardiser.of(as_maps(data.train_z).to(data.device))
        start = pixels(data.train_x).mean(dim=0).to(data.device)
        z = as_maps(data.test_z[: self.images]).to(data.device)
        return torch.cat([self._invert(network, standardise, start, part).cpu() for part in z.split(self.batch_size)])

    def _invert(self, network: torch.nn.Module, standardise: Standardiser, start: Tensor, z_BCHW: Tensor) -> Tensor:
        """Examples do not touch each other: the network normalises each by itself, and Adam each pixel."""
        goal = standardise(z_BCHW)
        x = start.expand(len(z_BCHW), -1, -1, -1).clone().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=self.learning_rate)
        for step in range(self.iterations):
            optimiser.param_groups[0]["lr"] = (
                0.5 * self.learning_rate * (1 + math.cos(math.pi * step / self.iterations))
            )
            distance = (standardise(as_maps(network(x))) - goal).square().sum()
            (gradient,) = torch.autograd.grad(distance + self.total_variation * total_variation(x), x)
            x.grad = gradient
            optimiser.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        return x.detach()


def total_variation(x_BCHW: Tensor) -> Tensor:
    """The sum of absolute differences between neighbours, along both axes."""
    return x_BCHW.diff(dim=-1).abs().sum() + x_BCHW.diff(dim=-2).abs().sum()
