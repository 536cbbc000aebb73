"""A3, a fresh convolutional network (SPEC E.4): what a feature hides from linear attackers.

Axes: B examples of a batch, C channels, H and W of the map, K classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, FloatArray, score
from orchestrator.sampling import ShuffledBatches, derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnAttack:
    """Three convolutions with GroupNorm, or the rest of a backbone, trained from scratch on standardised channels.

    AdamW under a one-cycle schedule. What answers is a running average of the weights, at the check with the best
    validation accuracy: with few rows this reads one to two points more than the last weights do.
    """

    name: str = "cnn"
    backbone: str | None = None
    """None: the small network. Else the backbone whose remaining children are trained, as a tenant's head would be."""
    split_index: int = 6
    """Where that backbone was cut."""
    width: int = 64
    epochs: int = 15
    min_steps: int = 600
    """At least so many steps, however few rows there are: 15 epochs of 300 rows teach a network nothing."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    """At its highest."""
    weight_decay: float = 1e-2
    dropout: float = 0.3
    averaging: float = 0.98
    """Of the weights, per step."""
    checks: int = 15
    """How often the validation rows are looked at."""
    patience: int = 6
    """Checks without a better accuracy or cross-entropy after which training stops."""

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "min_steps", "batch_size", "checks", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.name} attack: {name} must be at least 1, got {getattr(self, name)}")

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        started = time.perf_counter()
        train_z, validation_z, test_z = (t.to(data.device) for t in _standardised(data))
        shape = (train_z.shape[1], train_z.shape[2], train_z.shape[3])
        with _seeded(data.seed, data.device):
            network = self._network(shape, data.n_classes, data.seed).to(data.device)
            best = self._train(network, data, train_z, validation_z)
        network.load_state_dict(best.state)
        return score(
            self.name,
            data,
            validation_logits=best.logits,
            test_logits=_answers(network, test_z),
            seconds=time.perf_counter() - started,
        )

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

    def _train(self, network: nn.Module, data: AttackInput, train_z: Tensor, validation_z: Tensor) -> _Check:
        """The check with the best validation accuracy; of equals, the one with the least cross-entropy."""
        batches = ShuffledBatches(len(train_z), batch_size=self.batch_size, seed=derive_seed(data.seed, "batches"))
        total = max(self.min_steps, self.epochs * batches.steps_per_epoch)
        interval = math.ceil(total / self.checks)
        optimiser = torch.optim.AdamW(network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.learning_rate, total_steps=total, pct_start=0.2)
        average = copy.deepcopy(network).requires_grad_(False).eval()
        labels = torch.from_numpy(data.train_y).to(data.device)
        best: _Check | None = None
        least_loss, since = math.inf, 0
        for step in range(total):
            ids = torch.from_numpy(batches.ids(step)).to(data.device)
            network.train()
            loss = functional.cross_entropy(network(train_z[ids]), labels[ids])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
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
        return best


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Weights and dropout draw from PyTorch's global generators: seed them here, and leave them as they were."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(derive_seed(seed, "network"))
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive_seed(seed, "dropout"))
        yield


def small_cnn(shape: tuple[int, int, int], n_classes: int, *, width: int, dropout: float) -> nn.Module:
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


class _Check(NamedTuple):
    """What the averaged network knew at one moment."""

    accuracy: float
    loss: float
    logits: FloatArray
    state: dict[str, Tensor]

    @property
    def rank(self) -> tuple[float, float]:
        return self.accuracy, -self.loss


def _check(network: nn.Module, validation_z: Tensor, data: AttackInput) -> _Check:
    logits = _answers(network, validation_z)
    targets = torch.from_numpy(data.validation_y)
    loss = functional.cross_entropy(torch.from_numpy(logits), targets).item()
    if not math.isfinite(loss):
        raise FloatingPointError("the attacker diverged: its validation loss is not finite")
    accuracy = float((logits.argmax(axis=1) == data.validation_y).mean())
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return _Check(accuracy, loss, logits, state)


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, keep: float) -> None:
    for mean, now in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(now, 1 - keep)


@torch.no_grad()
def _answers(network: nn.Module, z_NCHW: Tensor) -> FloatArray:
    """(N, K) logits in evaluation mode."""
    network.eval()
    return np.asarray(torch.cat([network(part) for part in z_NCHW.split(256)]).float().cpu().numpy())


def _standardised(data: AttackInput) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test features as maps, per channel by the training rows; a vector is a 1x1 map."""
    parts = [torch.from_numpy(z).float() for z in (data.train_z, data.validation_z, data.test_z)]
    train, validation, test = (part.reshape(*part.shape[:2], *(part.shape[2:] or (1, 1))) for part in parts)
    mean, std = train.mean(dim=(0, 2, 3), keepdim=True), train.std(dim=(0, 2, 3), keepdim=True, correction=0)
    std = torch.where(std > 0, std, 1.0)
    return (train - mean) / std, (validation - mean) / std, (test - mean) / std
