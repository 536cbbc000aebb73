"""Which trial may begin now: one whose encoder is there. Whoever runs trials asks here, and tells how they went.

Encoders are made ahead of their trials by the same cluster, so no trial waits for one while it holds a CPU, and no two
train the same.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from orchestrator.sweep.encoders import Encoders
from orchestrator.sweep.proposers import Proposer
from orchestrator.sweep.recipe import Need
from orchestrator.sweep.records import Trial, failure_file, trial_file, trial_id
from orchestrator.sweep.space import Point
from orchestrator.sweep.store import Store


class Signal(Enum):
    """In place of a point."""

    WAIT = "an encoder is being trained"
    END = "there is nothing more to try"


_DIED: Final = "its process died, or was stopped"


class Dispatcher:
    """Hands out every point once, and knows what became of it."""

    def __init__(
        self, proposer: Proposer, encoders: Encoders, store: Store, *, on_trial: Callable[[Trial, bool], None]
    ) -> None:
        """``on_trial`` is told of every trial that is over, and whether it was so before this process began."""
        self._proposer, self._encoders, self._store, self._on_trial = proposer, encoders, store, on_trial
        self._waiting: list[Point] = []
        self._exhausted = False
        self.running: set[Point] = set()
        self.trials: dict[Point, Trial] = {}

    def next(self) -> Point | Signal:
        """A point whose encoder is ready."""
        self._encoders.settle()
        self._drop_hopeless()
        ready = next((p for p in self._waiting if self._encoders.state(Need.of(p)) == "ready"), None)
        if ready is not None:
            self._waiting.remove(ready)
            self._look_ahead()
            return self._begin(ready)
        self._look_ahead()
        self._drop_hopeless()
        ready = next((p for p in self._waiting if self._encoders.state(Need.of(p)) == "ready"), None)
        if ready is not None:
            self._waiting.remove(ready)
            return self._begin(ready)
        return Signal.WAIT if self._waiting or not self._exhausted else Signal.END

    def done(self, point: Point, *, curve: list[float] | None = None, stopped: bool = False) -> Trial:
        """The trial is over: by its record, or by what it left behind instead."""
        self.running.discard(point)
        number = trial_id(point)
        found = self._store.read_json(trial_file(number))
        if found is not None:
            trial = Trial.from_json(found)
        elif stopped:
            why = f"stopped after {len(curve or [])} epochs: others had a higher utility"
            trial = Trial(id=number, point=point, status="stopped", problem=why, curve=curve or [])
            self._store.write_json(trial_file(number), trial.to_json())
        else:
            said = self._store.read_json(failure_file(number))
            problem = _DIED if said is None else str(said["problem"])
            trial = Trial(id=number, point=point, status="failed", problem=problem, curve=curve or [])
        return self._over(trial, before=False)

    def _look_ahead(self) -> None:
        """Take points until there are enough encoders in the making."""
        for point in self._waiting:
            if self._encoders.has_room:
                self._encoders.want(Need.of(point))
        while not self._exhausted and self._encoders.has_room and self._may_take_more:
            proposed = self._proposer.propose()
            if proposed is None:
                self._exhausted = True
                return
            found = self._store.read_json(trial_file(trial_id(proposed)))
            if found is not None:
                self._over(Trial.from_json(found), before=True)
                continue
            self._encoders.want(Need.of(proposed))
            self._waiting.append(proposed)
            if self._encoders.state(Need.of(proposed)) == "ready":
                return

    @property
    def _may_take_more(self) -> bool:
        limit = self._proposer.at_once
        return limit is None or len(self._waiting) + len(self.running) < limit

    def _drop_hopeless(self) -> None:
        """Trials whose encoder cannot be had."""
        for point in list(self._waiting):
            problem = self._encoders.problems.get(Need.of(point))
            if problem is not None:
                self._waiting.remove(point)
                self._over(Trial(id=trial_id(point), point=point, status="failed", problem=problem), before=False)

    def _begin(self, point: Point) -> Point:
        self.running.add(point)
        return point

    def _over(self, trial: Trial, *, before: bool) -> Trial:
        self.trials[trial.point] = trial
        self._proposer.told(trial)
        self._on_trial(trial, before)
        return trial
