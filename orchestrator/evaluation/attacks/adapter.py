"""A4, the victim's own head behind an adapter (SPEC E.4): the paper's swap test made adaptive.

Axes: B examples, C channels, H and W of the map.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional

from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, NotApplicable
from orchestrator.evaluation.attacks.fitting import Fitting, answered, maps, seeded


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterAttack(Fitting):
    """A 1x1 convolution in front of a copy of the head that the target's tenant holds.

    It begins as the identity, so that the attack begins where the swap test ends. The adapter is trained alone, then
    together with the head. The feature is not standardised: the head expects its own scale.
    """

    name: str = "adapter"
    epochs: int = 5
    """Of each of the two trainings, like `min_steps`: there may be most of a backbone behind the adapter."""
    min_steps: int = 150
    max_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-2
    """Of the adapter alone: a permutation of the channels is far from the identity."""
    head_learning_rate: float = 1e-3
    """Of adapter and head together."""

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        started = time.perf_counter()
        if data.head is None:
            raise NotApplicable("there is no head of the target's tenant")
        train_z, validation_z, test_z = maps(data)
        with seeded(data.seed, data.device):
            head = copy.deepcopy(data.head.module).requires_grad_(False)
            network = nn.Sequential(Adapter(tuple(train_z.shape[1:]), data.head.feature_shape), head).to(data.device)
            best = self.fit(network, data, train_z, validation_z)
            together = copy.deepcopy(network).requires_grad_(True)
            later = replace(self, learning_rate=self.head_learning_rate).fit(together, data, train_z, validation_z)
        if later.rank > best.rank:
            best, network = later, together
        return answered(self.name, data, network, best, test_z, started=started)


class Adapter(nn.Module):
    """``z (B, C, H, W)`` to what a head takes: pooled or repeated to its map, then a 1x1 convolution."""

    def __init__(self, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        super().__init__()
        self.wanted = wanted
        self.sides: tuple[int, int] = (wanted[1], wanted[2]) if len(wanted) == 3 else (1, 1)
        self.convolution = nn.Conv2d(given[0], wanted[0], 1)
        bias = self.convolution.bias
        assert bias is not None
        nn.init.dirac_(self.convolution.weight)
        nn.init.zeros_(bias)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, *wanted)."""
        if z_BCHW.shape[2:] != self.sides:
            z_BCHW = functional.adaptive_avg_pool2d(z_BCHW, self.sides)
        adapted: Tensor = self.convolution(z_BCHW)
        return adapted.reshape(len(adapted), *self.wanted)
