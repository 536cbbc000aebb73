"""How parameters are updated: AdamW with a learning rate that is a function of the step alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from orchestrator.errors import ConfigError
from orchestrator.shard import WHOLE, Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimiserConfig:
    """AdamW and its schedule. The paper uses a constant 1e-4 (section 4.2)."""

    lr: float = 1e-3
    """Learning rate, at its highest."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: falls to zero over the training; constant: the paper's."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be a positive number, got {self.lr}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be >= 0, got {self.weight_decay}")

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
        """An AdamW over these parameters, in one pass over memory: a loop over tensors takes six times as long."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def learning_rate(self, step: int, total_steps: int) -> float:
        """The rate of one step, counted from 0."""
        if self.schedule == "constant":
            return self.lr
        return 0.5 * self.lr * (1 + math.cos(math.pi * min(step, total_steps) / max(1, total_steps)))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def snapshot(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of its state. PyTorch's own state_dict shares tensors with the optimiser, which goes on changing them."""
    return copy.deepcopy(optimiser.state_dict())


def restore(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from a snapshot, which stays as it is."""
    optimiser.load_state_dict(copy.deepcopy(dict(state)))


class Update(Protocol):
    """Forward, then one step from the gradients at the outputs. At most one forward is in flight."""

    optimizer: torch.optim.Optimizer

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        """Run the module and keep its graph."""
        ...

    def step(self, outputs: Sequence[Tensor], cut_gradients: Sequence[Tensor]) -> None:
        """Back-propagate the given gradients and update."""
        ...

    def discard(self) -> None:
        """Forget the forward in flight."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Optimiser (and accountant) state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        ...


class PlainUpdate:
    """An update without privacy; `orchestrator.privacy.dp.PrivateStep` is the one with."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, shard: Shard = WHOLE) -> None:
        self.module, self.optimizer, self._shard = module, optimizer, shard

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        """Run the module and keep its graph."""
        outputs: Mapping[str, Tensor] = self.module(x)
        return outputs

    def step(self, outputs: Sequence[Tensor], cut_gradients: Sequence[Tensor]) -> None:
        """Back-propagate the given gradients and update. Outputs without a graph (identity modules) are passed over."""
        self.optimizer.zero_grad(set_to_none=True)
        with_graph = [(z, dz) for z, dz in zip(outputs, cut_gradients, strict=True) if z.requires_grad and len(z)]
        if with_graph:
            torch.autograd.backward([z for z, _ in with_graph], [dz for _, dz in with_graph])
        self._shard.sum_gradients(self.module.parameters())
        self.optimizer.step()

    def discard(self) -> None:
        """Nothing to forget: the graph belongs to the outputs."""

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {"optimizer": snapshot(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        restore(self.optimizer, state["optimizer"])
