"""What an evaluation found: one row per released feature and target. Every value is a fraction in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from orchestrator.evaluation.attacks.base import AttackResult, jsonable
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import Floor, clopper_pearson

CLAIM_MARGIN = 0.02
"""How far the upper bound of the leak may lie above what needs no feature (SPEC E.2)."""
CLAIM_SEEDS = 3
"""How often every attacker must have been trained before a claim (SPEC E.2)."""
CLAIM_ATTACKS = ("linear", "mlp", "cnn", "adapter", "decensoring", "svm", "knn")
"""Who must have tried before a claim: "at chance" for a few kinds of attackers says little about the next kind."""
MEASURES = ("accuracy", "balanced_accuracy", "auc", "bits")
"""Of an attacker."""


def coalition_name(tasks: Sequence[str]) -> str:
    """``pose``, or ``pose + eyes`` where two tenants put their features together."""
    return " + ".join(tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackSummary:
    """One attack over its seeds. Seeds that crashed or were skipped are counted, and enter no number."""

    attack: str
    results: tuple[AttackResult, ...]

    @property
    def completed(self) -> tuple[AttackResult, ...]:
        """The results that hold numbers."""
        return tuple(result for result in self.results if result.completed)

    @property
    def crashed(self) -> int:
        """How many seeds crashed."""
        return sum(result.crashed is not None for result in self.results)

    @property
    def skipped(self) -> str | None:
        """Why the attack was not run; None if it was."""
        return next((result.skipped for result in self.results if result.skipped is not None), None)

    def mean(self, measure: str) -> float:
        """Mean over the seeds of one of `MEASURES`; NaN if there is none."""
        values = self._values(measure)
        return fmean(values) if values else math.nan

    def seed_interval(self, measure: str) -> tuple[float, float]:
        """95 % interval of that mean by Student's t: what other weights and batches could have given.

        It says nothing about other test rows. NaN with fewer than two seeds, or where a measure is not defined.
        """
        from scipy.stats import t

        values = self._values(measure)
        if len(values) < 2 or any(map(math.isnan, values)):
            return math.nan, math.nan
        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        return fmean(values) - half, fmean(values) + half

    def _values(self, measure: str) -> list[float]:
        return [getattr(result, measure) for result in self.completed]

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
        means = {measure: jsonable(self.mean(measure)) for measure in MEASURES}
        seeds = {measure: [jsonable(bound) for bound in self.seed_interval(measure)] for measure in MEASURES}
        return {
            "attack": self.attack,
            **means,
            "accuracy_max": jsonable(self.accuracy_max),
            "accuracy_low": jsonable(low),
            "accuracy_high": jsonable(high),
            "seed_intervals": seeds,
            "crashed": self.crashed,
            "skipped": self.skipped,
            "results": [result.to_json() for result in self.results],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What no attacker exceeds, whatever it computes: follows from bits, not from attacks. See `row_bounds`."""

    bits: float
    """That the feature, or the coalition's features together, carry at most."""
    accuracy: float
    """For labels as frequent as those of the test rows."""
    method: str
    """Which inequality gave it; see `orchestrator.privacy.bounded.bounds`. given_task: on what its task leaves over."""
    assumption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakageRow:
    """What the feature of one task, or of two together, tells about the label of another."""

    feature: str
    """As `coalition_name` writes it."""
    target: str
    n_test: int
    swap: float | None
    """The feature in the target's own head; None where there is no such head, or it takes another shape."""
    swap_perm: float | None
    """The same, with the answers renamed as suits the attacker best."""
    attacks: tuple[AttackSummary, ...]
    chance: float
    """A guess: always the commonest class, or one drawn among all, whichever is better."""
    chance_balanced: float
    """The balanced accuracy of any answer that does not depend on the row."""
    target_bits: float
    """H(Y) of the test labels: as many bits as there are to read."""
    floor: Floor
    """From the label of the feature's own task alone."""
    target_shares: tuple[float, ...] = ()
    """How frequent each label is among the test rows: with bits, it gives the bound."""
    bound: Bound | None = None
    """Of a bounded feature, or of several, by capacity: whatever the images."""
    rate_bound: Bound | None = None
    """By the rate that was measured: for images like the test rows, with 95 % confidence; None where it was not."""
    control: tuple[AttackSummary, ...] = ()
    """The same attackers on features that tell nothing but their own label; empty where that was not measured."""

    def best_by(self, measure: str) -> AttackSummary | None:
        """The attack with the highest mean of one of `MEASURES`; None if there is none."""
        return _best_by(self.attacks, measure)

    def leak_by(self, measure: str) -> float | None:
        """Its mean."""
        best = self.best_by(measure)
        return None if best is None else best.mean(measure)

    @property
    def best(self) -> AttackSummary | None:
        """The attack with the highest mean accuracy; None if all crashed."""
        return self.best_by("accuracy")

    @property
    def leak(self) -> float | None:
        """Mean accuracy of the best retrained attacker over its seeds; None if no attacker came through."""
        return self.leak_by("accuracy")

    @property
    def leak_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        return None if self.best is None else self.best.accuracy_interval

    @property
    def luck(self) -> float | None:
        """What the best attacker of the control reads; None where there is none."""
        best = _best_by(self.control, "accuracy")
        return None if best is None else best.mean("accuracy")

    @property
    def breaks_bound(self) -> bool:
        """Whether the leak is above a bound beyond what the choice of test rows explains: something is broken."""
        bounds = [bound.accuracy for bound in (self.bound, self.rate_bound) if bound is not None]
        return bool(bounds) and self.leak_interval is not None and self.leak_interval[0] > min(bounds)

    @property
    def baseline(self) -> float:
        """What needs no feature: the larger of floor and chance."""
        return max(self.floor.accuracy, self.chance)

    @property
    def excess(self) -> float | None:
        """The headline number: what the feature adds to the baseline. Negative for attackers below it."""
        return None if self.leak is None else self.leak - self.baseline

    @property
    def excess_balanced(self) -> float | None:
        """The same in balanced accuracy."""
        leak = self.leak_by("balanced_accuracy")
        return None if leak is None else leak - max(self.floor.balanced_accuracy, self.chance_balanced)

    @property
    def claim_obstacle(self) -> str | None:
        """Why this row must not be called "at chance"; None where it may (SPEC E.2)."""
        crashed = [summary.attack for summary in self.attacks if summary.crashed]
        interval = self.leak_interval
        if crashed:
            return f"crashed: {', '.join(crashed)}"
        if interval is None:
            return f"not run: {', '.join(summary.attack for summary in self.attacks)}"
        if (seeds := min(len(summary.results) for summary in self.attacks)) < CLAIM_SEEDS:
            return f"{seeds} seed(s) per attack; a claim needs {CLAIM_SEEDS}"
        limit = self.baseline + CLAIM_MARGIN
        if interval[1] > limit:
            return f"the leak may be as high as {interval[1]:.1%}; a claim needs at most {limit:.1%}"
        if missing := [attack for attack in CLAIM_ATTACKS if attack not in {s.attack for s in self.attacks}]:
            return f"not tried: {', '.join(missing)}"
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
            "chance_balanced": self.chance_balanced,
            "target_bits": self.target_bits,
            "target_shares": list(self.target_shares),
            "floor": self.floor.accuracy,
            "floor_balanced": self.floor.balanced_accuracy,
            "leak": self.leak,
            "leak_attack": None if self.best is None else self.best.attack,
            "leak_low": low,
            "leak_high": high,
            "excess": self.excess,
            "bound": None if self.bound is None else asdict(self.bound),
            "rate_bound": None if self.rate_bound is None else asdict(self.rate_bound),
            **{f"leak_{measure}": self.leak_by(measure) for measure in MEASURES if measure != "accuracy"},
            "excess_balanced": self.excess_balanced,
            "luck": self.luck,
            "control": [summary.to_json() for summary in self.control],
            "chance_claim_allowed": self.chance_claim_allowed,
            "claim_obstacle": self.claim_obstacle,
        }


def _best_by(attacks: Sequence[AttackSummary], measure: str) -> AttackSummary | None:
    measured = [summary for summary in attacks if not math.isnan(summary.mean(measure))]
    return max(measured, key=lambda summary: summary.mean(measure), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """What could be read of a target if nothing were held back. Attackers far below it may just be weak."""

    target: str
    attacks: tuple[AttackSummary, ...]
    """The same attackers, on the universal feature u = E(x), which is not released."""
    images: float | None = None
    """Test accuracy of a network trained for the target on the images themselves; None where none was trained."""

    @property
    def best(self) -> AttackSummary | None:
        """The attack on u with the highest mean accuracy; None if there is none."""
        completed = [summary for summary in self.attacks if summary.completed]
        return max(completed, key=lambda summary: summary.mean("accuracy"), default=None)

    @property
    def accuracy(self) -> float | None:
        """The larger of the two; None if neither was measured."""
        universal = None if self.best is None else self.best.mean("accuracy")
        return max((value for value in (universal, self.images) if value is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, derived numbers included."""
        return {
            "target": self.target,
            "accuracy": self.accuracy,
            "universal": None if self.best is None else self.best.mean("accuracy"),
            "universal_attack": None if self.best is None else self.best.attack,
            "images": self.images,
            "attacks": [summary.to_json() for summary in self.attacks],
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
    collusion: tuple[LeakageRow, ...] = ()
    """Two released features together."""
    ceilings: tuple[Ceiling, ...] = ()
    """One per target, where they were measured."""

    @property
    def features(self) -> tuple[str, ...]:
        """The released features, in order."""
        return tuple(dict.fromkeys(row.feature for row in self.rows))

    def row(self, feature: str, target: str) -> LeakageRow:
        """The row of that pair."""
        return next(row for row in self.rows if (row.feature, row.target) == (feature, target))

    def apart(self, together: LeakageRow) -> float | None:
        """The larger leak of the two features of a collusion row, each alone: what colluding is to be compared with."""
        of_members = [
            row.leak
            for row in self.rows
            if row.target == together.target
            and row.leak is not None
            and row.feature in together.feature.split(coalition_name(("", "")))
        ]
        return max(of_members, default=None)

    def ceiling(self, target: str) -> Ceiling | None:
        """Of that target; None if it was not measured."""
        return next((ceiling for ceiling in self.ceilings if ceiling.target == target), None)

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
            "collusion": [{**row.to_json(), "leak_apart": self.apart(row)} for row in self.collusion],
            "ceilings": [ceiling.to_json() for ceiling in self.ceilings],
        }
