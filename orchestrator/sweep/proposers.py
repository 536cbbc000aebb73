"""Which point comes next: from a list, or as Optuna suggests in the light of what is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from orchestrator.errors import MissingExtraError
from orchestrator.sweep.objectives import Objective
from orchestrator.sweep.records import Trial
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.space import DIMENSIONS, Dimension, Point

WORST: Final = 1e9
"""Stands for infinity, which Optuna's sampler cannot measure areas with."""
_REPEATS: Final = 50
"""How often Optuna may suggest what is known already, before the space counts as searched."""


class Proposer(Protocol):
    """Points one by one, each once."""

    @property
    def at_once(self) -> int | None:
        """How many may be taken before anything is known of them; None: all."""
        ...

    def propose(self) -> Point | None:
        """The next one; None if there is none any more."""
        ...

    def told(self, trial: Trial) -> None:
        """How one of them went."""
        ...


class ListProposer:
    """What was decided beforehand."""

    at_once = None

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = iter(points)

    def propose(self) -> Point | None:
        """The next of the list."""
        return next(self._points, None)

    def told(self, trial: Trial) -> None:
        """Nothing follows from it."""


class OptunaProposer:
    """Multi-objective TPE (Ozaki et al. 2020), seeded. Points that are known already are told it before it begins."""

    def __init__(
        self,
        settings: SweepSettings,
        *,
        width: int,
        resolve: Callable[[Point], Point],
        known: Sequence[Trial] = (),
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError("cluster", "optuna") from error

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.at_once: int | None = width
        self._optuna, self._objectives, self._resolve = optuna, settings.chosen, resolve
        self._space = settings.searched
        self._distributions = {d.name: _distribution(optuna, d) for d in self._space.dimensions if d.varies}
        constant = [o.direction for o in self._objectives]
        self._study = optuna.create_study(
            directions=["maximize" if direction == "max" else "minimize" for direction in constant],
            sampler=optuna.samplers.TPESampler(seed=settings.search_seed, multivariate=False),
        )
        assert settings.trials is not None
        self._left = settings.trials
        self._asked: dict[Point, Any] = {}
        self._seen: set[Point] = set()
        for trial in known:
            self._add(trial)

    def propose(self) -> Point | None:
        """What the sampler suggests, unless it suggests nothing new."""
        if self._left <= 0:
            return None
        for _ in range(_REPEATS):
            asked = self._study.ask(self._distributions)
            point = self._resolve(self._point(asked.params))
            if point not in self._seen:
                self._seen.add(point)
                self._asked[point] = asked
                self._left -= 1
                return point
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        self._left = 0
        return None

    def told(self, trial: Trial) -> None:
        """Its values; without one of them it has failed."""
        asked = self._asked.pop(trial.point, None)
        if asked is None:
            return
        values = optuna_values(trial, self._objectives)
        if values is None:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, values)

    def _add(self, trial: Trial) -> None:
        """A trial of an earlier attempt."""
        values = optuna_values(trial, self._objectives)
        self._seen.add(trial.point)
        self._left -= 1
        if values is None:
            return
        params = {name: _parameter(getattr(trial.point, name)) for name in self._distributions}
        self._study.add_trial(
            self._optuna.trial.create_trial(params=params, distributions=self._distributions, values=values)
        )

    def _point(self, params: dict[str, Any]) -> Point:
        values: dict[str, Any] = {}
        for name in DIMENSIONS:
            dimension: Dimension = getattr(self._space, name)
            if name not in params:
                values[name] = dimension.values[0]
            elif params[name] == "none":
                values[name] = None
            else:
                values[name] = params[name]
        return Point(**values)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        return optuna.distributions.CategoricalDistribution([_parameter(v) for v in dimension.values])
    log = dimension.kind == "loguniform"
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=log)


def _parameter(value: Any) -> Any:
    return "none" if value is None else value


def optuna_values(trial: Trial, objectives: Sequence[Objective]) -> list[float] | None:
    """The objectives' values as Optuna takes them; None unless the trial has all of them."""
    values = [trial.values.get(objective.name, math.nan) for objective in objectives]
    if trial.status != "done" or any(map(math.isnan, values)):
        return None
    return [max(-WORST, min(WORST, value)) for value in values]
