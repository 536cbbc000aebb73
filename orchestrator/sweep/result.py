"""What a sweep found: every trial, every configuration over its seeds, and those that no other beats."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

from orchestrator.sweep.objectives import OBJECTIVES, Objective, front
from orchestrator.sweep.plan import Plan
from orchestrator.sweep.records import Trial
from orchestrator.sweep.space import Point, Space, Value

FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The trials of one configuration, one a seed, that came through."""

    trials: tuple[Trial, ...]

    @property
    def point(self) -> Point:
        """With its first seed."""
        return self.trials[0].point

    @property
    def key(self) -> tuple[Value, ...]:
        """Without the seed."""
        return self.point.configuration

    def values(self) -> dict[str, float]:
        """Mean over the seeds, by objective; NaN where one seed lacks the number."""
        return {name: self.mean(name) for name in OBJECTIVES if any(name in t.values for t in self.trials)}

    def mean(self, name: str) -> float:
        """Of one objective."""
        return fmean(trial.values.get(name, math.nan) for trial in self.trials)

    def spread(self, name: str) -> tuple[float, float]:
        """The least and the most of the seeds."""
        found = [trial.values.get(name, math.nan) for trial in self.trials]
        return min(found), max(found)

    @property
    def utility_on_test(self) -> float:
        """Mean over seeds and tasks."""
        return fmean(trial.utility_on_test for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All of it."""

    run: str
    """Of the sweep."""
    catalog: str
    data: str
    space: Space
    objectives: tuple[Objective, ...]
    plan: Plan
    trials: tuple[Trial, ...]
    """In the order of the plan, or in which they ended."""
    encoders_trained: int
    """By this sweep, in all its attempts."""
    spent: float
    """Epsilon of the images when the sweep was over."""
    command: str
    created: str
    seconds: float
    """Wall time of this attempt."""
    registered: Mapping[str, str] = field(default_factory=dict)
    """Objective to the catalog's encoder version under which its best trial is published."""

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """Those whose trials all came through."""
        groups: dict[tuple[Value, ...], list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault(trial.point.configuration, []).append(trial)
        whole = (found for found in groups.values() if all(trial.status == "done" for trial in found))
        return tuple(Configuration(trials=tuple(found)) for found in whole)

    @property
    def front(self) -> tuple[Configuration, ...]:
        """Those that no other beats in every objective, by the first objective."""
        by_key = {c.key: c for c in self.configurations}
        keys = front({key: c.values() for key, c in by_key.items()}, self.objectives)
        first = self.objectives[0]
        return tuple(sorted((by_key[key] for key in keys), key=lambda c: first.cost(c.mean(first.name))))

    def best(self, objective: Objective) -> Configuration | None:
        """On the front, the best of one objective; the first objective decides between equals."""
        first = self.objectives[0]
        return min(
            self.front,
            key=lambda c: (objective.cost(c.mean(objective.name)), first.cost(c.mean(first.name))),
            default=None,
        )

    @property
    def failed(self) -> tuple[Trial, ...]:
        """Trials that did not come through."""
        return tuple(trial for trial in self.trials if trial.status == "failed")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, with every number."""
        on_front = {configuration.key for configuration in self.front}
        return {
            "format": FORMAT,
            "run": self.run,
            "catalog": self.catalog,
            "data": self.data,
            "command": self.command,
            "created": self.created,
            "seconds": self.seconds,
            "space": self.space.to_json(),
            "objectives": [{"name": o.name, "direction": o.direction} for o in self.objectives],
            "chosen_on": "the validation subset",
            "plan": self.plan.to_json(),
            "encoders_trained": self.encoders_trained,
            "epsilon_spent": self.spent,
            "front": [trial.id for c in self.front for trial in c.trials],
            "best": {o.name: [trial.id for trial in best.trials] for o in self.objectives if (best := self.best(o))},
            "registered": dict(self.registered),
            "trials": [
                {**trial.to_json(), "on_front": trial.status == "done" and trial.point.configuration in on_front}
                for trial in self.trials
            ],
        }

    def to_parquet(self) -> bytes:
        """One row a trial, in flat columns, for notebooks."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        on_front = {configuration.key for configuration in self.front}
        rows = [_row(trial, on_front=trial.point.configuration in on_front) for trial in self.trials]
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()


def _row(trial: Trial, *, on_front: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.id, **trial.point.to_json(), "status": trial.status}
    for name in OBJECTIVES:
        value = trial.values.get(name)
        row[f"{name}_measured" if name == "epsilon" else name] = None if value is None or math.isnan(value) else value
    row["utility_on_test"] = None if math.isnan(trial.utility_on_test) else trial.utility_on_test
    row["on_front"] = on_front and trial.status == "done"
    row |= {f"{task}_validation": next(iter(m.values())) for task, m in trial.validation.items()}
    row |= {f"{task}_test": next(iter(m.values())) for task, m in trial.test.items()}
    row |= {f"excess_{leak['feature']}_on_{leak['target']}": leak["excess"] for leak in trial.leaks}
    row |= {f"seconds_{part}": seconds for part, seconds in trial.seconds.items()}
    row |= {"reused": ",".join(trial.reused), "node": trial.node, "problem": trial.problem}
    return row


def ordered(trials: Mapping[Point, Trial], points: Sequence[Point] | None) -> tuple[Trial, ...]:
    """As planned, or as they ended."""
    if points is None:
        return tuple(trials.values())
    return tuple(trials[point] for point in points if point in trials)
