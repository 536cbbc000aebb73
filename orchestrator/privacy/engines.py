"""What turns gradients at a module's outputs into a private update, and which way of it suits a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orchestrator.privacy.clipping import ClippedGradients, PartClip
from orchestrator.privacy.layer_gradients import layers_without_rule
from orchestrator.privacy.per_example import PerExampleHooks
from orchestrator.shard import WHOLE, Shard


class ClippingEngine(Protocol):
    """life:  idle --forward--> recorded --accumulate--> clipped --apply--> idle;  reset leads back to idle."""

    def forward(self, x: Tensor) -> Any:
        """Run the module on a batch, which may be empty."""

    def accumulate(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], n_examples: int) -> None:
        """Sum the clipped gradients, from those of the mean loss at the outputs. Raises before any weight changes."""

    def apply(self, shard: Shard = WHOLE) -> None:
        """Add the noise, divide by the expected batch size, and update the weights."""

    def reset(self) -> None:
        """Forget everything that was recorded."""

    def close(self) -> None:
        """Leave nothing on the module."""


class EngineType(Protocol):
    """How an engine is made."""

    def __call__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        generator: torch.Generator,
        parts: Mapping[str, PartClip] | None = None,
    ) -> ClippingEngine:
        """With ``parts``, each is clipped and noised by itself; an engine that cannot raises `PrivacyRefusal`."""


def engine_for(module: nn.Module) -> EngineType:
    """`ClippedGradients` is twice as fast and lighter, but knows the layers of our own networks alone.

    Opacus's hooks know more of them, and weights that two layers share.
    """
    return PerExampleHooks if layers_without_rule(module) else ClippedGradients
