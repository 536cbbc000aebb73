"""What is kept of each trial."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from orchestrator.errors import CheckpointError
from orchestrator.sweep.space import Point

Status = Literal["done", "stopped", "failed"]
"""stopped: early, because others did better."""
_INFINITE: Final = "infinite"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial that is over."""

    id: str
    point: Point
    status: Status
    problem: str = ""
    """What went wrong, or why it was stopped."""
    values: Mapping[str, float] = field(default_factory=dict)
    """By the names of `orchestrator.sweep.objectives.OBJECTIVES`; NaN where there is no number, infinite without DP."""
    test: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task to metrics on the test subset, by which nothing is chosen."""
    validation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    leaks: Sequence[Mapping[str, Any]] = ()
    """A row for each feature and target, measured on the validation subset."""
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """Target to what attackers read of the universal feature, where it was measured."""
    curve: Sequence[float] = ()
    """Utility after each epoch."""
    reused: Sequence[str] = ()
    """What was there already: encoder, features, ceilings."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    node: str = ""

    @property
    def utility_on_test(self) -> float:
        """Mean accuracy over the tasks that are sold; NaN if it was not measured."""
        found = [next(iter(metrics.values())) for metrics in self.test.values()]
        return sum(found) / len(found) if found else math.nan

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary: NaN is null, and an infinite epsilon a word."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)} | {"point": self.point.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Read what `to_json` wrote."""
        try:
            known = {f.name: data[f.name] for f in fields(cls)}
            values = {name: _number(value) for name, value in known["values"].items()}
            return cls(**{**known, "point": Point.from_json(known["point"]), "values": values})
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the record of a trial is damaged: {error!r}") from error


def trial_id(point: Point) -> str:
    """The same for the same point, in every attempt."""
    return hashlib.sha256(json.dumps(point.to_json(), sort_keys=True).encode()).hexdigest()[:12]


def trial_file(number: str) -> str:
    """In the store."""
    return f"trials/{number}.json"


def failure_file(number: str) -> str:
    """In the store: what a trial said before it ended without a record."""
    return f"failures/{number}.json"


def weights_file(number: str) -> str:
    """In the store."""
    return f"weights/{number}.state"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else _INFINITE if math.isinf(value) else value
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _number(value: Any) -> float:
    return math.nan if value is None else math.inf if value == _INFINITE else float(value)
