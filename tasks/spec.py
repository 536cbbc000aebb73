"""What a task is: which label, which classes, which loss, and how success is measured."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from tasks.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """One learning task, as the producer offers it and a tenant buys it."""

    name: str
    """The task's name in commands, the catalog and endpoints: lower case letters, digits, ``-`` and ``_``."""
    target: str
    """The label column that the task predicts."""
    classes: tuple[str, ...]
    """Class names in label order: label ``k`` means ``classes[k]``."""
    head: str = "classifier"
    """What the head answers with; see `tasks.heads`."""
    loss: str = "cross_entropy"
    """See `tasks.losses`."""
    metrics: tuple[str, ...] = ("accuracy", "balanced_accuracy", "auc")
    """See `tasks.metrics`. The first is the one that summaries show."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"task name {self.name!r}: use at most 63 lower case letters, digits, '-' and '_', no '-' or '_' first"
            )
        if len(self.classes) < 2:
            raise ConfigError(
                f"task {self.name!r} has {len(self.classes)} class(es) ({', '.join(self.classes) or 'none'}); "
                "a classification task needs at least two: choose another column"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ConfigError(f"task {self.name!r} names a class twice: {', '.join(self.classes)}")
        if not self.metrics:
            raise ConfigError(f"task {self.name!r} has no metric")

    @property
    def n_outputs(self) -> int:
        """How many numbers the head answers with per example."""
        return len(self.classes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TaskSpec:
        """Read what `to_json` wrote. An unknown key is an error."""
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ConfigError(f"unknown key in a task: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        return cls(**{**data, "classes": tuple(data["classes"]), "metrics": tuple(data["metrics"])})
