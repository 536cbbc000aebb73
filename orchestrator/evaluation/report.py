"""What an evaluation found: one row per released feature and target. Every value is a fraction in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from orchestrator.evaluation.attacks.base import AttackResult, jsonable
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import Floor, clopper_pearson

CLAIM_MARGIN = 0.02
"""How far the upper bound of the leak may lie above what needs no feature (SPEC E.2)."""
CLAIM_SEEDS = 3
"""How often every attacker must have been trained before a claim (SPEC E.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackSummary:
    """One attack over its seeds. Seeds that crashed are counted, and enter no number."""

    attack: str
    results: tuple[AttackResult, ...]

    @property
    def completed(self) -> tuple[AttackResult, ...]:
        """The results that did not crash."""
        return tuple(result for result in self.results if result.crashed is None)

    @property
    def crashed(self) -> int:
        """How many seeds crashed."""
        return len(self.results) - len(self.completed)

    def mean(self, measure: str) -> float:
        """Mean over the seeds of ``accuracy``, ``balanced_accuracy``, ``auc`` or ``bits``; NaN if all crashed."""
        values = [getattr(result, measure) for result in self.completed]
        return fmean(values) if values else math.nan

    @property
    def accuracy_max(self) -> float:
        """The best seed."""
        return max((result.accuracy for result in self.completed), default=math.nan)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval of the mean accuracy.

        All seeds are measured on the same test rows, so they do not add up to a larger sample: the count is the mean
        one, rounded outwards.
        """
        if not self.completed:
            return math.nan, math.nan
        total = self.completed[0].total
        correct = fmean(result.correct for result in self.completed)
        return clopper_pearson(math.floor(correct), total)[0], clopper_pearson(math.ceil(correct), total)[1]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        low, high = self.accuracy_interval
        means = {measure: jsonable(self.mean(measure)) for measure in ("accuracy", "balanced_accuracy", "auc", "bits")}
        return {
            "attack": self.attack,
            **means,
            "accuracy_max": jsonable(self.accuracy_max),
            "accuracy_low": jsonable(low),
            "accuracy_high": jsonable(high),
            "crashed": self.crashed,
            "results": [result.to_json() for result in self.results],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakageRow:
    """What the feature of one task tells about the label of another."""

    feature: str
    target: str
    n_test: int
    swap: float | None
    """The feature in the target's own head; None where there is no such head, or it takes another shape."""
    swap_perm: float | None
    """The same, with the answers renamed as suits the attacker best."""
    attacks: tuple[AttackSummary, ...]
    chance: float
    """Always answering the majority."""
    floor: Floor
    """From the label of the feature's own task alone."""

    @property
    def best(self) -> AttackSummary | None:
        """The attack with the highest mean accuracy; None if all crashed."""
        completed = [summary for summary in self.attacks if summary.completed]
        return max(completed, key=lambda summary: summary.mean("accuracy"), default=None)

    @property
    def leak(self) -> float | None:
        """Mean accuracy of the best retrained attacker over its seeds; None if no attacker came through."""
        return None if self.best is None else self.best.mean("accuracy")

    @property
    def leak_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        return None if self.best is None else self.best.accuracy_interval

    @property
    def baseline(self) -> float:
        """What needs no feature: the larger of floor and chance."""
        return max(self.floor.accuracy, self.chance)

    @property
    def excess(self) -> float | None:
        """The headline number: what the feature adds to the baseline. Negative for attackers below it."""
        return None if self.leak is None else self.leak - self.baseline

    @property
    def claim_obstacle(self) -> str | None:
        """Why this row must not be called "at chance"; None where it may (SPEC E.2)."""
        crashed = [summary.attack for summary in self.attacks if summary.crashed]
        interval = self.leak_interval
        if crashed or interval is None:
            return f"crashed: {', '.join(crashed)}"
        if (seeds := min(len(summary.results) for summary in self.attacks)) < CLAIM_SEEDS:
            return f"{seeds} seed(s) per attack; a claim needs {CLAIM_SEEDS}"
        limit = self.baseline + CLAIM_MARGIN
        if interval[1] > limit:
            return f"the leak may be as high as {interval[1]:.1%}; a claim needs at most {limit:.1%}"
        return None

    @property
    def chance_claim_allowed(self) -> bool:
        """Whether the row may be called "at chance"."""
        return self.claim_obstacle is None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, derived numbers included."""
        low, high = self.leak_interval or (None, None)
        return {
            "feature": self.feature,
            "target": self.target,
            "n_test": self.n_test,
            "swap": self.swap,
            "swap_perm": self.swap_perm,
            "attacks": [summary.to_json() for summary in self.attacks],
            "chance": self.chance,
            "floor": self.floor.accuracy,
            "floor_balanced": self.floor.balanced_accuracy,
            "leak": self.leak,
            "leak_attack": None if self.best is None else self.best.attack,
            "leak_low": low,
            "leak_high": high,
            "excess": self.excess,
            "chance_claim_allowed": self.chance_claim_allowed,
            "claim_obstacle": self.claim_obstacle,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakageReport:
    """Rows feature by feature, targets in the order in which they were given."""

    rows: tuple[LeakageRow, ...]
    own: Mapping[str, float | None]
    """Test accuracy of each task with its own feature and head; None where no head was given."""
    private: frozenset[str]
    """Targets whose feature is never released."""
    targets: tuple[str, ...]
    budget: AttackBudget
    seed: int

    @property
    def features(self) -> tuple[str, ...]:
        """The released features, in order."""
        return tuple(dict.fromkeys(row.feature for row in self.rows))

    def row(self, feature: str, target: str) -> LeakageRow:
        """The row of that pair."""
        return next(row for row in self.rows if (row.feature, row.target) == (feature, target))

    @property
    def worst(self) -> LeakageRow | None:
        """The row with the largest excess."""
        return max(
            (row for row in self.rows if row.excess is not None), key=lambda row: row.excess or 0.0, default=None
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "seed": self.seed,
            "budget": self.budget.to_json(),
            "targets": list(self.targets),
            "private": sorted(self.private),
            "own": dict(self.own),
            "rows": [row.to_json() for row in self.rows],
        }
