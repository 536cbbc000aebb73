"""A whole sweep: planned, refused or reserved, run, compared, and written down."""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.assembly import TrainingData
from orchestrator.catalog import Catalog
from orchestrator.privacy.ledger import Account, Ledger
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import OpenData, open_data
from orchestrator.sweep.checks import check_attackable, check_places, check_points
from orchestrator.sweep.dispatch import Dispatcher, Signal
from orchestrator.sweep.encoders import Encoders, HereTrainer
from orchestrator.sweep.plan import Plan, make_plan
from orchestrator.sweep.proposers import ListProposer, OptunaProposer, Proposer
from orchestrator.sweep.recipe import Need
from orchestrator.sweep.records import Trial, failure_file, trial_id, weights_file
from orchestrator.sweep.registering import Registrar, winners
from orchestrator.sweep.result import Result, ordered
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.space import Point
from orchestrator.sweep.store import Store
from orchestrator.sweep.tracked import TrackedTrials
from orchestrator.sweep.trial import Study, run_trial


class SweepObserver(Protocol):
    """Told how a sweep goes."""

    def on_plan(self, plan: Plan) -> None:
        """Nothing has begun yet."""
        ...

    def on_encoder(self, need: Need, state: str) -> None:
        """One is found, is being trained, is ready or has failed."""
        ...

    def on_trial(self, trial: Trial, *, done: int, total: int, before: bool) -> None:
        """One is over; ``before``: it was so when this process began."""
        ...


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """The numbers, and where they are."""

    result: Result
    folder: Path
    """On this machine, for reports and figures."""
    store: Store
    """The sweep's own part of the storage."""


def sweep(
    settings: SweepSettings,
    *,
    catalog: Catalog,
    tracked: Callable[[RunFolder], TrackedTrials],
    run_id: str,
    observer: RunObserver,
    watcher: SweepObserver,
    command: str,
    write: Callable[[SweepOutcome], None],
) -> SweepOutcome:
    """Everything that was asked for, or what an interrupted attempt at the same has left to do.

    ``write`` makes files of the outcome. Until it has, the sweep can be gone on with. Raises what
    `checks`, `Plan.check` and the ledger refuse, before the first trial.
    """
    with RunFolder.open("sweep", settings.identity, settings.runtime.local, resume=settings.resume) as folder:
        opened = open_data(settings.data, observer)
        data = opened.training_data([str(settings.private), *settings.tasks])
        run = _Run(settings, opened, data, catalog, folder, run_id, observer, watcher)
        outcome = run.go(tracked(folder), command=command)
        write(outcome)
        run.close(outcome.result)
        return outcome


class _Run:
    """One attempt under way."""

    def __init__(
        self,
        settings: SweepSettings,
        opened: OpenData,
        data: TrainingData,
        catalog: Catalog,
        folder: RunFolder,
        run_id: str,
        observer: RunObserver,
        watcher: SweepObserver,
    ) -> None:
        self.settings, self.opened, self.data, self.catalog = settings, opened, data, catalog
        self.folder, self.run_id, self.observer, self.watcher = folder, run_id, observer, watcher
        self.store = Store(settings.runtime.shared).within("sweeps", folder.run)
        self.out = (settings.out or settings.runtime.local.storage_path / "sweeps" / folder.run).expanduser().absolute()
        self.points = self._points()

    def go(self, tracked: TrackedTrials, *, command: str) -> SweepOutcome:
        """Refuse, plan, run, compare."""
        started = time.perf_counter()
        self._check()
        encoders = self._encoders()
        plan = self._plan(encoders)
        self.watcher.on_plan(plan)
        plan.check()
        if plan.exact:
            encoders.set_aside([encoder.need for encoder in plan.encoders])
        self.folder.leave_unfinished()
        trials = self._trials(encoders, tracked, total=plan.n_trials)
        self._note(encoders, trials)
        result = Result(
            run=self.folder.run,
            catalog=self.catalog.name,
            data=self.opened.table.name,
            space=self.settings.searched,
            objectives=self.settings.chosen,
            plan=plan,
            trials=ordered(trials, self.points),
            encoders_trained=encoders.n_trained,
            spent=self._spent(plan),
            command=command,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - started,
        )
        if self.settings.register:
            result = dataclasses.replace(result, registered=self._register(result, encoders))
        if not result.left_to_do:
            encoders.release()
        return SweepOutcome(result=result, folder=self.out, store=self.store)

    def close(self, result: Result) -> None:
        """Everything is written. What failed may still be tried again."""
        self.folder.leave_unfinished(unfinished=bool(result.left_to_do))

    # -- before --------------------------------------------------------------------------------------------------------

    def _points(self) -> list[Point] | None:
        """All of them, where they can be known now."""
        settings, space = self.settings, self.settings.searched
        if settings.search == "optuna":
            return None
        if settings.search == "grid":
            found = space.grid()
        else:
            assert settings.trials is not None
            found = sorted(space.random(settings.trials, seed=settings.search_seed), key=_by_encoder)
        return list(dict.fromkeys(settings.resolved(point) for point in found))

    def _check(self) -> None:
        settings, specs, size = self.settings, self.data.specs, self.data.image_size
        check_attackable(settings, specs)
        corners = self.points if self.points is not None else _corners(settings)
        check_points(settings, corners, specs, size=size)
        check_places(self.store, settings.out)
        if settings.runtime.engine == "ray":
            from orchestrator.sweep.tuning import check_cluster

            check_cluster(settings.runtime)

    def _encoders(self) -> Encoders:
        trainer: Any = HereTrainer()
        if self.settings.runtime.engine == "ray":
            from orchestrator.sweep.tuning import RayTrainer

            trainer = RayTrainer(self.data, self.settings.runtime)
        return Encoders(
            self.settings,
            self.data,
            opened=self.opened,
            store=self.store,
            catalog=self.catalog,
            folder=self.folder,
            trainer=trainer,
            run_id=self.run_id,
            tell=self.watcher.on_encoder,
        )

    def _plan(self, encoders: Encoders) -> Plan:
        return make_plan(
            self.settings,
            self.points,
            recipe=encoders.recipe,
            is_published=encoders.is_published,
            account=self._account(),
            data=self.opened.table.name,
            n_train=len(self.data.rows["train"]),
            run=self.folder.run,
        )

    def _account(self) -> Account | None:
        """What the ledger says of these images so far."""
        path = self.settings.runtime.local.ledger_path
        if not path.exists():
            return None
        with Ledger(path) as ledger:
            return {a.fingerprint: a for a in ledger.accounts()}.get(self.opened.table.image_set)

    # -- the trials ----------------------------------------------------------------------------------------------------

    def _trials(self, encoders: Encoders, tracked: TrackedTrials, *, total: int) -> dict[Point, Trial]:
        self.observer.on_stage("trials")
        study = Study(
            settings=self.settings,
            store=self.store,
            attacked="leakage" in self.settings.objectives,
            keeps_weights=self.settings.register,
            secrets=self.opened.secrets(self.settings.task_privacy.named_secrets),
        )
        keeper = _Keeper(self.settings, self.store)
        count = 0

        def over(trial: Trial, before: bool) -> None:
            nonlocal count
            count += 1
            keeper.keep(trial)
            tracked.keep(trial)
            self.watcher.on_trial(trial, done=count, total=total, before=before)

        dispatcher = Dispatcher(self._proposer(), encoders, self.store, on_trial=over)
        if self.settings.runtime.engine == "ray":
            from orchestrator.sweep.tuning import run_on_tune

            attempt = int(self.folder.recall("attempt", 0)) + 1
            self.folder.remember(attempt=attempt)
            run_on_tune(study, self.data, dispatcher, name=f"attempt-{attempt}")
        else:
            _run_here(study, self.data, dispatcher)
        return dispatcher.trials

    def _proposer(self) -> Proposer:
        if self.points is not None:
            return ListProposer(self.points)
        width = 1
        if self.settings.runtime.engine == "ray":
            from orchestrator.sweep.tuning import room_for

            width = room_for(self.settings.runtime)
        known = [Trial.from_json(found) for name in self.store.names("trials") if (found := self._read(name))]
        return OptunaProposer(
            self.settings, width=min(width, self.settings.runtime.concurrency or width), resolve=self.settings.resolved,
            known=known,
        )  # fmt: skip

    def _read(self, name: str) -> dict[str, Any] | None:
        return self.store.read_json(f"trials/{name}")

    # -- after ---------------------------------------------------------------------------------------------------------

    def _spent(self, plan: Plan) -> float:
        account = self._account()
        return 0.0 if account is None or not account.entries else account.spent(plan.delta)

    def _note(self, encoders: Encoders, trials: dict[Point, Trial]) -> None:
        """In the ledger, beside what is accounted."""
        n = sum(bool(trial.values) for trial in trials.values())
        tasks = ", ".join(self.settings.tasks)
        encoders.note_outside(
            f"modules and heads of {tasks} in {n} trials of a sweep: trained without noise",
            f"a sweep compared {n} trials by looking at validation images",
        )

    def _register(self, result: Result, encoders: Encoders) -> dict[str, str]:
        done: dict[str, str] | None = self.folder.recall("registered")
        if done is not None:
            return done
        self.observer.on_stage("publishing the best")
        for trial in winners(result).values():
            encoders.want(Need.of(trial.point))  # of an earlier attempt: known to the catalog, not yet to this process
        registrar = Registrar(
            settings=self.settings,
            data=self.data,
            encoders=encoders,
            store=self.store,
            catalog=self.catalog,
            run_id=self.run_id,
            secrets=self.opened.secrets(self.settings.task_privacy.named_secrets),
        )
        versions = registrar.register(result)
        self.folder.remember(registered=versions)
        for name in self.store.names("weights"):
            self.store.remove(f"weights/{name}")
        return versions


class _Keeper:
    """Keeps the weights of what may still be the best, and no others: heads are large."""

    def __init__(self, settings: SweepSettings, store: Store) -> None:
        self._active, self._objectives, self._store = settings.register, settings.chosen, store
        self._trials: list[Trial] = []

    def keep(self, trial: Trial) -> None:
        """Drop the weights of those that are on no front any more. With several seeds the means decide: keep all."""
        if not self._active or trial.status != "done":
            return
        from orchestrator.sweep.objectives import front

        self._trials.append(trial)
        if len({t.point.seed for t in self._trials}) > 1:
            return
        kept = set(front({t.id: t.values for t in self._trials}, self._objectives))
        for old in self._trials:
            if old.id not in kept:
                self._store.remove(weights_file(old.id))
        self._trials = [t for t in self._trials if t.id in kept]


def _run_here(study: Study, data: TrainingData, dispatcher: Dispatcher) -> None:
    """One trial after the other, in this process."""
    while True:
        point = dispatcher.next()
        if point is Signal.END:
            return
        if not isinstance(point, Point):
            continue
        number = trial_id(point)
        try:
            run_trial(study, data, point, number=number)
        except Exception as error:
            study.store.write_json(failure_file(number), {"problem": f"{type(error).__name__}: {error}"})
        dispatcher.done(point)


def _corners(settings: SweepSettings) -> list[Point]:
    """Enough points of a space to find out whether any of it cannot be trained."""
    space = settings.searched
    values = {d.name: d.values if d.kind == "choice" else (d.low, d.high) for d in space.dimensions}
    first = {name: found[0] for name, found in values.items()}
    changed = [{**first, name: value} for name, found in values.items() for value in found]
    return [settings.resolved(Point(**point)) for point in changed]  # type: ignore[arg-type]


def _by_encoder(point: Point) -> tuple[float, ...]:
    """Trials that share an encoder come one after the other."""
    return (point.split_index, math.inf if point.epsilon is None else point.epsilon, point.seed)
