"""How an attacker's network is trained: what A2 to A5 have in common.

Axes: N rows, B examples of a batch, C channels, H and W of the map, K classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, FloatArray, score
from orchestrator.evaluation.attacks.maps import Standardiser, as_maps
from orchestrator.optimisation import OptimiserConfig
from orchestrator.sampling import ShuffledBatches, derive_seed

BatchLoss = Callable[[nn.Module, Tensor], Tensor]
"""(network, (B,) positions among the training rows) to the mean loss of that batch."""


class Check(NamedTuple):
    """What the averaged network knew at one moment."""

    accuracy: float
    loss: float
    logits: FloatArray
    """(N, K) of the validation rows."""
    state: dict[str, Tensor]

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return self.accuracy, -self.loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """AdamW under a one-cycle schedule, with an early stop.

    What answers is a running average of the weights, at the check with the best validation accuracy: with few rows
    this reads one to two points more than the last weights do.
    """

    epochs: int = 15
    min_steps: int = 600
    """At least so many steps, however few rows there are: 15 epochs of 300 rows teach a network nothing."""
    max_steps: int = 4000
    """At most so many, however many rows there are."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    """At its highest."""
    weight_decay: float = 1e-2
    averaging: float = 0.98
    """Of the weights, per step."""
    checks: int = 15
    """How often the validation rows are looked at."""
    patience: int = 6
    """Checks without a better accuracy or cross-entropy after which training stops."""

    def __post_init__(self) -> None:
        for name in ("epochs", "min_steps", "max_steps", "batch_size", "checks", "patience"):
            self.check_count(name)

    def check_count(self, name: str) -> None:
        """Raise `ConfigError` if that setting is below 1."""
        if getattr(self, name) < 1:
            raise ConfigError(f"an attack's {name} must be at least 1, got {getattr(self, name)}")

    def fit(
        self,
        network: nn.Module,
        data: AttackInput,
        train_z: Tensor,
        validation_z: Tensor,
        loss: BatchLoss | None = None,
    ) -> Check:
        """Train what requires a gradient, from the present weights; the network is left at the check returned.

        That is the one with the best validation accuracy, and of equals the one with the least cross-entropy. Without
        a ``loss`` it is the cross-entropy of the target. Random state is the caller's: see `seeded`.
        """
        batches = ShuffledBatches(len(train_z), batch_size=self.batch_size, seed=derive_seed(data.seed, "batches"))
        total = min(self.max_steps, max(self.min_steps, self.epochs * batches.steps_per_epoch))
        interval = math.ceil(total / self.checks)
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimiser = OptimiserConfig(lr=self.learning_rate, weight_decay=self.weight_decay).build(parameters)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.learning_rate, total_steps=total, pct_start=0.2)
        average = copy.deepcopy(network).requires_grad_(False).eval()
        loss = loss or cross_entropy_on(train_z, torch.from_numpy(data.train_y).to(data.device))
        best: Check | None = None
        least_loss, since = math.inf, 0
        for step in range(total):
            network.train()
            optimiser.zero_grad(set_to_none=True)
            loss(network, torch.from_numpy(batches.ids(step)).to(data.device)).backward()
            optimiser.step()
            schedule.step()
            _follow(average, network, min(self.averaging, (step + 1) / (step + 10)))
            if (step + 1) % interval and step + 1 < total:
                continue
            check = _check(average, validation_z, data)
            since = 0 if best is None or check.rank > best.rank or check.loss < least_loss else since + 1
            least_loss = min(least_loss, check.loss)
            best = check if best is None or check.rank > best.rank else best
            if since >= self.patience:
                break
        assert best is not None
        network.load_state_dict(best.state)
        return best


def answered(
    name: str, data: AttackInput, network: nn.Module, best: Check, test_z: Tensor, *, started: float
) -> AttackResult:
    """What the fitted network, left at ``best``, says of the test rows; ``started`` is by `time.perf_counter`."""
    test_logits = answers(network, test_z)
    seconds = time.perf_counter() - started
    return score(name, data, validation_logits=best.logits, test_logits=test_logits, seconds=seconds)


def cross_entropy_on(train_z: Tensor, labels_N: Tensor) -> BatchLoss:
    """The cross-entropy of the network's answers for the rows of a batch."""
    return lambda network, ids: functional.cross_entropy(network(train_z[ids]), labels_N[ids])


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Weights and dropout draw from PyTorch's global generators: seed them here, and leave them as they were."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(derive_seed(seed, "network"))
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive_seed(seed, "dropout"))
        yield


@torch.no_grad()
def answers(network: nn.Module, z_N: Tensor) -> FloatArray:
    """(N, K) logits in evaluation mode."""
    network.eval()
    return np.asarray(torch.cat([network(part) for part in z_N.split(256)]).float().cpu().numpy())


def maps(data: AttackInput) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test features as (N, C, H, W), on the device."""
    train, validation, test = (as_maps(z).to(data.device) for z in (data.train_z, data.validation_z, data.test_z))
    return train, validation, test


def standardised_maps(data: AttackInput) -> tuple[Tensor, Tensor, Tensor]:
    """The same, standardised per channel by the training rows."""
    train, validation, test = maps(data)
    standardise = Standardiser.of(train)
    return standardise(train), standardise(validation), standardise(test)


def _check(network: nn.Module, validation_z: Tensor, data: AttackInput) -> Check:
    logits = answers(network, validation_z)
    targets = torch.from_numpy(data.validation_y)
    loss = functional.cross_entropy(torch.from_numpy(logits), targets).item()
    if not math.isfinite(loss):
        raise FloatingPointError("the attacker diverged: its validation loss is not finite")
    accuracy = float((logits.argmax(axis=1) == data.validation_y).mean())
    return Check(accuracy, loss, logits, {name: value.clone() for name, value in network.state_dict().items()})


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, keep: float) -> None:
    for mean, now in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(now, 1 - keep)
