"""What a task is: which label, which classes or which map, which loss, and how success is measured."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """One learning task, as the producer offers it and a tenant buys it."""

    name: str
    """The task's name in commands, the catalog and endpoints: lower case letters, digits, ``-`` and ``_``."""
    target: str
    """The label column that the task predicts."""
    classes: tuple[str, ...] = ()
    """Class names in label order: label ``k`` means ``classes[k]``. None for a task whose answer is a map."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of the map that a dense task answers with; None: it answers with a class."""
    levels: int = 256
    """Of a map: its labels are whole numbers from 0 to ``levels - 1``, which stand for 0 to 1."""
    head: str = "classifier"
    """What the head answers with: classifier, a logit a class; map, a number a place of ``shape``."""
    loss: str = "cross_entropy"
    """See `tasks.losses`."""
    metrics: tuple[str, ...] = ("accuracy", "balanced_accuracy", "auc")
    """See `tasks.metrics`. The first is the one that summaries show."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"task name {self.name!r}: use at most 63 lower case letters, digits, '-' and '_', no '-' or '_' first"
            )
        if not self.metrics:
            raise ConfigError(f"task {self.name!r} has no metric")
        if self.shape is not None:
            self._check_map(self.shape)
            return
        if len(self.classes) < 2:
            raise ConfigError(
                f"task {self.name!r} has {len(self.classes)} class(es) ({', '.join(self.classes) or 'none'}); "
                "a classification task needs at least two: choose another column"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ConfigError(f"task {self.name!r} names a class twice: {', '.join(self.classes)}")

    def _check_map(self, shape: tuple[int, int, int]) -> None:
        if self.classes or self.head != "map":
            raise ConfigError(f"task {self.name!r} answers with a map: it has no classes, and its head is 'map'")
        if len(shape) != 3 or min(shape) < 1 or self.levels < 2:
            raise ConfigError(
                f"task {self.name!r} needs a map (C, H, W) of at least 2 levels, got {shape} of {self.levels}"
            )

    @property
    def dense(self) -> bool:
        """Whether it answers with a map, and not with a class."""
        return self.shape is not None

    @property
    def n_outputs(self) -> int:
        """How many numbers the head answers with per example, or per place of a map."""
        return len(self.classes) if self.shape is None else self.shape[0]

    @property
    def n_labels(self) -> int:
        """Labels are whole numbers from 0 to one less."""
        return len(self.classes) if self.shape is None else self.levels

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Of one example's label: () for a class."""
        return () if self.shape is None else self.shape

    @property
    def answers(self) -> str:
        """In words, for reports."""
        return f"{len(self.classes)} classes" if self.shape is None else f"a map of {'x'.join(map(str, self.shape))}"

    def targets(self, labels: NDArray[np.int64]) -> NDArray[np.int64] | NDArray[np.float32]:
        """What losses and metrics compare with, of labels (N, *label_shape): classes, or maps of 0 to 1."""
        return labels if self.shape is None else (labels / (self.levels - 1)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back. Of a class it says nothing of maps."""
        found = asdict(self)
        return found if self.dense else {name: value for name, value in found.items() if name not in _OF_MAPS}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TaskSpec:
        """Read what `to_json` wrote. An unknown key is an error."""
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ConfigError(f"unknown key in a task: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        shape = data.get("shape")
        lists = {"classes": tuple(data["classes"]), "metrics": tuple(data["metrics"])}
        return cls(**{**data, **lists, "shape": None if shape is None else tuple(shape)})


_OF_MAPS = frozenset({"shape", "levels"})
