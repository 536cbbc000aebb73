"""What trials are compared by, and which of them no other beats.

All that a choice is made by is measured on the validation subset; the test subset is looked at for what is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from orchestrator.errors import ConfigError
from tasks.registry import look_up


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One number of a trial."""

    name: str
    direction: Literal["max", "min"]
    title: str
    """With its unit, for tables and axes."""
    scale: float = 1.0
    """By which the number is multiplied for people."""
    digits: int = 1

    def better(self, one: float, other: float) -> bool:
        """Whether the first is better than the second."""
        return one > other if self.direction == "max" else one < other

    def cost(self, value: float) -> float:
        """Smaller is better."""
        return -value if self.direction == "max" else value

    def shown(self, value: float | None) -> str:
        """For a table."""
        if value is None or math.isnan(value):
            return "-"
        return "none" if math.isinf(value) else f"{self.scale * value:.{self.digits}f}"


OBJECTIVES: Final[Mapping[str, Objective]] = {
    objective.name: objective
    for objective in (
        Objective(name="utility", direction="max", title="utility, %", scale=100),
        Objective(name="leakage", direction="min", title="excess leakage, points", scale=100),
        Objective(name="epsilon", direction="min", title="epsilon", digits=2),
        Objective(name="bytes", direction="min", title="bytes a feature", digits=0),
        Objective(name="head_mb", direction="min", title="head, MB", digits=2),
        Objective(name="step_time", direction="min", title="step, ms", scale=1000),
        Objective(name="latency", direction="min", title="latency, ms", scale=1000, digits=2),
    )
}
"""utility: mean accuracy of the tasks that are sold, on the validation subset. leakage: the worst excess over what
needs no feature, of the best attacker of the quick suite, on the validation subset. epsilon: of the encoder. bytes: of
one image's feature, in float16, as it is sent. head_mb: the largest head, in float32. step_time: of a step of phase 2,
beside whatever else ran then. latency: of one image through encoder and module, on one thread."""

T = TypeVar("T")


def chosen_objectives(names: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of those names. Raises `UnknownNameError` and `ConfigError`."""
    if not names:
        raise ConfigError(f"a sweep needs an objective: name some of {', '.join(OBJECTIVES)} with --objectives")
    if len(set(names)) != len(names):
        raise ConfigError(f"an objective is named twice in --objectives {','.join(names)}")
    return tuple(look_up(OBJECTIVES, "objective", name) for name in names)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the first costs are nowhere larger than the second, and somewhere smaller."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(candidates: Mapping[T, Mapping[str, float]], objectives: Sequence[Objective]) -> list[T]:
    """Those that no other dominates, in their order. One that lacks a number is never on the front."""
    costs = {
        name: [objective.cost(values[objective.name]) for objective in objectives]
        for name, values in candidates.items()
        if all(not math.isnan(values.get(objective.name, math.nan)) for objective in objectives)
    }
    return [name for name, cost in costs.items() if not any(dominates(other, cost) for other in costs.values())]
