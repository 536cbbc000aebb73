"""What an attacker is given, what it answers with, and how its answers are scored.

An attacker holds features z of one task and labels of *another* one, trains whatever it likes on them, and is measured
on rows that it never saw (SPEC E.4). Axes: N examples, C channels, H and W of the map, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from orchestrator.errors import DataError
from tasks.metrics import compute_metrics
from tasks.spec import TaskSpec

FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]
ImageArray = NDArray[np.uint8]


class NotApplicable(Exception):  # noqa: N818 - a signal to `attack_once`; no user ever sees it
    """The attack needs what this attacker does not have. That is neither a crash nor a sign of privacy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantHead:
    """M_j, which the tenant of the target's own task holds."""

    module: nn.Module
    """Shared by all attacks of a process: who trains it, copies it first."""
    feature_shape: tuple[int, ...]
    """(C, H, W) or (D,) of the feature that it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackInput:
    """Three disjoint sets of features and of labels of the target.

    The validation rows come from the attacker's own subset, also where the attacker is trained on the defender's
    training rows besides: a feature can look different on the rows that the defence was fitted to.
    """

    train_z: FloatArray = field(repr=False)
    """(N, C, H, W), or (N, D) for features that are vectors."""
    train_y: LabelArray = field(repr=False)
    validation_z: FloatArray = field(repr=False)
    validation_y: LabelArray = field(repr=False)
    test_z: FloatArray = field(repr=False)
    test_y: LabelArray = field(repr=False)
    n_classes: int
    seed: int
    device: str = "cpu"
    """Where to train: ``cpu``, ``cuda``, ``cuda:1`` ..."""
    head: TenantHead | None = field(default=None, repr=False)
    """Of the target's task; None where there is none to be had."""
    train_images: ImageArray | None = field(default=None, repr=False)
    """(N, S, S, 3) of the training rows, where the attacker owns the images that its features were made from."""
    validation_images: ImageArray | None = field(default=None, repr=False)
    """The same of the validation rows. The images of the test rows are what an attacker never has."""

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            z, y = getattr(self, f"{name}_z"), getattr(self, f"{name}_y")
            if len(z) != len(y) or len(y) == 0:
                raise DataError(f"the attack's {name} rows: {len(z)} features and {len(y)} labels; need one label each")
            if not np.isfinite(z).all():
                raise DataError(f"the attack's {name} features hold NaN or infinity")
            if y.min() < 0 or y.max() >= self.n_classes:
                raise DataError(
                    f"the attack's {name} labels run from {y.min()} to {y.max()}, not 0..{self.n_classes - 1}"
                )
        for name in ("train", "validation"):
            images, n = getattr(self, f"{name}_images"), len(getattr(self, f"{name}_y"))
            if images is not None and len(images) != n:
                raise DataError(f"the attack's {name} rows: {len(images)} images and {n} labels; need one image each")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackResult:
    """How well one attacker with one seed read the target on the test rows; or that it crashed."""

    attack: str
    seed: int
    correct: int = 0
    total: int = 0
    accuracy: float = math.nan
    """Fractions in [0, 1]; NaN after a crash, so that no sum or maximum takes a crash for privacy."""
    balanced_accuracy: float = math.nan
    auc: float = math.nan
    """Macro one-vs-rest; NaN also where the test rows have one class."""
    bits: float = math.nan
    """max(0, H(Y) - CE): a lower bound, in bits, on what z tells about the target."""
    seconds: float = 0.0
    crashed: str | None = None
    """What went wrong. A crashed attack says nothing about privacy."""
    skipped: str | None = None
    """What the attack would have needed. It was not run, and enters no number."""

    @property
    def completed(self) -> bool:
        """Whether there are numbers."""
        return self.crashed is None and self.skipped is None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; NaN becomes null."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


class Attack(Protocol):
    """One family of attackers with its settings: a frozen dataclass, so that it can travel to a worker."""

    @property
    def name(self) -> str:
        """What tables and reports call it."""
        ...

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows. May raise.

        Raises `NotApplicable` where it needs what the input does not hold.
        """
        ...


def attack_once(attack: Attack, data: Callable[[], AttackInput], seed: int) -> AttackResult:
    """Run an attack; whatever it raises, its input's refusal included, becomes a result that is marked as crashed."""
    started = time.perf_counter()
    try:
        return attack.run(data())
    except NotApplicable as missing:
        return AttackResult(attack=attack.name, seed=seed, skipped=str(missing))
    except Exception as error:
        seconds = time.perf_counter() - started
        return AttackResult(attack=attack.name, seed=seed, seconds=seconds, crashed=f"{type(error).__name__}: {error}")


def score(
    attack: str, data: AttackInput, *, validation_logits: FloatArray, test_logits: FloatArray, seconds: float
) -> AttackResult:
    """Score (N, K) test logits. The validation logits set the temperature under which bits are counted."""
    if not (np.isfinite(test_logits).all() and np.isfinite(validation_logits).all()):
        raise FloatingPointError("the attacker diverged: its answers hold NaN or infinity")
    names = tuple(str(k) for k in range(data.n_classes))
    metrics = compute_metrics(TaskSpec(name=attack, target=attack, classes=names), test_logits, data.test_y)
    temperature = calibrated_temperature(validation_logits, data.validation_y)
    cross_entropy = cross_entropy_bits(test_logits / temperature, data.test_y)
    return AttackResult(
        attack=attack,
        seed=data.seed,
        correct=int((test_logits.argmax(axis=1) == data.test_y).sum()),
        total=len(data.test_y),
        accuracy=metrics["accuracy"],
        balanced_accuracy=metrics["balanced_accuracy"],
        auc=metrics["auc"],
        bits=max(0.0, entropy_bits(data.test_y) - cross_entropy),
        seconds=seconds,
    )


def calibrated_temperature(logits: FloatArray, labels: LabelArray) -> float:
    """The divisor of the logits with the least cross-entropy.

    An attacker that is right but overconfident would otherwise seem to know nothing in bits.
    """
    candidates = np.logspace(-1, 3, 81)
    return float(min(candidates, key=lambda t: cross_entropy_bits(logits / t, labels)))


def cross_entropy_bits(logits: FloatArray, labels: LabelArray) -> float:
    """Mean -log2 softmax(logits)[label]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_norm = np.log(np.exp(shifted).sum(axis=1))
    return float((log_norm - shifted[np.arange(len(labels)), labels]).mean() / math.log(2))


def entropy_bits(labels: LabelArray) -> float:
    """H(Y) of the label frequencies."""
    p = np.bincount(labels) / len(labels)
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def jsonable(value: object) -> object:
    """JSON has no NaN: null says that there is no number."""
    return None if isinstance(value, float) and math.isnan(value) else value
