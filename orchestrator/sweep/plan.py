"""What a sweep will do and what it will cost, before any of it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from orchestrator.errors import BudgetExceededError
from orchestrator.privacy.accounting import composed_epsilon, rounded_up
from orchestrator.privacy.dp import default_delta
from orchestrator.privacy.ledger import Account
from orchestrator.report.sheet import Sheet
from orchestrator.sweep.recipe import Need, Recipe
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.space import Point, Space, shown


@dataclass(frozen=True, kw_only=True)
class PlannedEncoder:
    """One encoder of the plan."""

    need: Need
    published: bool
    """In the catalog: it is used as it is, and costs nothing any more."""
    mechanism: tuple[float, float, int] | None
    """(noise multiplier, sample rate, steps); None without DP."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before the first step."""

    points: tuple[Point, ...] | None
    """None where each is chosen in the light of the ones before."""
    n_trials: int
    encoders: tuple[PlannedEncoder, ...]
    """With Optuna the most expensive that it may ask for."""
    exact: bool
    """Whether exactly these encoders will be trained, and not at most."""
    data: str
    delta: float
    spent_before: float
    """Epsilon of the images so far, what others have reserved included."""
    total: float
    """With this sweep."""
    limit: float | None

    @property
    def to_train(self) -> int:
        """Encoders that are not in the catalog."""
        return sum(not encoder.published for encoder in self.encoders)

    @property
    def words(self) -> str:
        """For the terminal and the report."""
        most = "" if self.exact else "at most "
        found = len(self.encoders) - self.to_train
        have = f", {found} found in the catalog" if found else ""
        limit = "no limit is set" if self.limit is None else f"the limit is {self.limit:g}"
        trials = f"{self.n_trials} trials" if self.exact else f"up to {self.n_trials} trials"
        return (
            f"{trials}, {most}{self.to_train} encoder(s) to train{have}. Privacy budget of {self.data}: epsilon "
            f"{rounded_up(self.spent_before)} is spent or reserved, {most}{rounded_up(self.total)} with this sweep; "
            f"{limit} (at delta {self.delta:g}, by Renyi DP)."
        )

    def sheet(self) -> Sheet:
        """The encoders, as a table."""
        rows = [
            [
                str(e.need.split_index),
                shown(e.need.epsilon),
                str(e.need.seed),
                "-" if e.mechanism is None else f"{e.mechanism[0]:.3f}",
                "-" if e.mechanism is None else str(e.mechanism[2]),
                "found in the catalog" if e.published else "to be trained",
            ]
            for e in self.encoders
        ]
        return Sheet(
            title="Encoders" if self.exact else "Encoders, at the most",
            names=["split", "epsilon", "seed", "noise", "steps", "what"],
            rows=rows,
            words=frozenset({"what"}),
            note="Each is trained once and charged once, however many trials stand on it.",
        )

    def check(self) -> None:
        """Raise `BudgetExceededError` if the sweep as a whole would pass the limit."""
        if self.limit is None or self.total <= self.limit:
            return
        raise BudgetExceededError(
            f"this sweep would overspend the privacy budget of {self.data}: {self.to_train} private training(s) would "
            f"bring it from epsilon {rounded_up(self.spent_before)} to {rounded_up(self.total)}, and the limit is "
            f"{self.limit:g} (at delta {self.delta:g}, by Renyi DP). Nothing was trained. Try fewer or smaller "
            "--epsilon, fewer --split-index or --seeds, or raise the limit (pipelines/ledger.py limit)"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "trials": self.n_trials,
            "encoders": [
                {**e.need._asdict(), "published_before": e.published, "mechanism": e.mechanism} for e in self.encoders
            ],
            "exact": self.exact,
            "delta": self.delta,
            "epsilon_before": self.spent_before,
            "epsilon_total": self.total,
            "epsilon_limit": self.limit,
        }


def make_plan(
    settings: SweepSettings,
    points: Sequence[Point] | None,
    *,
    recipe: Callable[[Need], Recipe],
    is_published: Callable[[Need], bool],
    account: Account | None,
    data: str,
    n_train: int,
    run: str = "",
) -> Plan:
    """What these points, or a search of so many, will take. ``run`` is who this sweep is in the ledger."""
    needs = list(dict.fromkeys(map(Need.of, points))) if points is not None else _worst(settings, settings.searched)
    encoders = tuple(_planned(need, recipe(need), published=is_published(need)) for need in needs)
    # What an earlier attempt at this sweep has reserved, and not finished, is part of what is still to be done.
    again = {recipe(e.need).key for e in encoders if not e.published}
    held = [
        (e.mechanism.noise_multiplier, e.mechanism.sample_rate, e.held)
        for e in (account.entries if account else ())
        if e.held and not (e.run == run and e.part in again)
    ]
    delta = _delta(settings, account, n_train)
    new = [e.mechanism for e in encoders if e.mechanism is not None and not e.published]
    return Plan(
        points=None if points is None else tuple(points),
        n_trials=len(points) if points is not None else settings.trials or 0,
        encoders=encoders,
        exact=points is not None,
        data=data,
        delta=delta,
        spent_before=composed_epsilon(tuple(held), delta),
        total=composed_epsilon((*held, *new), delta),
        limit=None if account is None or account.limit is None else account.limit[0],
    )


def _planned(need: Need, recipe: Recipe, *, published: bool) -> PlannedEncoder:
    plan = recipe.plan(secret=0)  # only the noise's size is looked at
    mechanism = None if plan is None else (plan.noise_multiplier, plan.sample_rate, plan.steps)
    return PlannedEncoder(need=need, published=published, mechanism=mechanism)


def _worst(settings: SweepSettings, space: Space) -> list[Need]:
    """The most expensive encoders that a search of so many trials can ask for."""
    assert settings.trials is not None
    if space.epsilon.kind != "choice":
        split, seed = space.split_index.values[0], space.seed.values[0]
        assert isinstance(split, int)
        assert isinstance(seed, int)
        return [Need(split, space.epsilon.high, seed)] * settings.trials
    combinations = product(space.split_index.values, space.epsilon.values, space.seed.values)
    needs = [Need(*combination) for combination in combinations]  # type: ignore[arg-type]
    return sorted(needs, key=lambda need: -(need.epsilon or 0))[: settings.trials]


def _delta(settings: SweepSettings, account: Account | None, n_train: int) -> float:
    if account is not None and account.delta is not None:
        return account.delta
    return settings.dp.delta if settings.dp.delta is not None else default_delta(n_train)
