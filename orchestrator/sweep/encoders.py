"""The encoders of a sweep: found in the catalog, or trained once, charged once and published, whoever needs them.

    encoder:  missing -> training -> ready
                            |
                            +-----> failed      its trials are reported, the others go on

All of it is in the driver: it holds the ledger, the catalog and the seeds of the noise. What travels is a job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol

from orchestrator.assembly import TrainingData
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord
from orchestrator.encoder_training import EncoderResult
from orchestrator.errors import MetaMorphosisError
from orchestrator.models.modules import ModuleConfig
from orchestrator.privacy.accounting import Accountant
from orchestrator.privacy.guarantee import Guarantee, guarantee_for
from orchestrator.privacy.plan import DpPlan
from orchestrator.runs.budget import Budget, without_noise
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.opening import OpenData
from orchestrator.runs.publishing import encoder_record, entry_of_phase_one
from orchestrator.sweep.recipe import Encoder, Need, Recipe, encoder_file
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.store import Store
from orchestrator.train_job import EncoderJob, train_encoder_here

RECIPE = "sweep_recipe"
"""Under which the catalog says how an encoder was made."""
State = Literal["missing", "training", "ready", "failed"]


class EncoderTrainer(Protocol):
    """Where encoders are trained."""

    @property
    def width(self) -> int:
        """How many at a time."""
        ...

    def start(self, job: EncoderJob) -> Future[EncoderResult]:
        """Begin. The future is done when the training is over."""
        ...


class HereTrainer:
    """In this process, one after the other."""

    width = 1

    def start(self, job: EncoderJob) -> Future[EncoderResult]:
        """Train, and return when it is over."""
        future: Future[EncoderResult] = Future()
        try:
            future.set_result(train_encoder_here(job))
        except MetaMorphosisError as error:
            future.set_exception(error)
        return future


class Encoders:
    """Of one sweep. `settle` is to be called now and then: it publishes what has been trained meanwhile."""

    def __init__(
        self,
        settings: SweepSettings,
        data: TrainingData,
        *,
        opened: OpenData,
        store: Store,
        catalog: Catalog,
        folder: RunFolder,
        trainer: EncoderTrainer,
        run_id: str,
        tell: Callable[[Need, str], None],
    ) -> None:
        self._settings, self._data, self._opened = settings, data, opened
        self._store, self._catalog, self._folder, self._trainer = store, catalog, folder, trainer
        self._run_id, self._tell = run_id, tell
        self._budget = Budget(opened.table, folder, settings.runtime.local)
        self._known = {record.data[RECIPE]: record.version for record in catalog.encoders() if RECIPE in record.data}
        self._running: dict[Need, Future[EncoderResult]] = {}
        self.versions: dict[Need, str] = {}
        """Of those that are ready, in the catalog."""
        self.problems: dict[Need, str] = {}
        """Why one failed."""

    # -- what is there -------------------------------------------------------------------------------------------------

    def recipe(self, need: Need) -> Recipe:
        """How it is made."""
        return Recipe.of(self._settings, need, self._data)

    def is_published(self, need: Need) -> bool:
        """Whether the catalog has it, from this sweep or an earlier one: then it costs nothing any more."""
        return self.recipe(need).key in self._known

    def state(self, need: Need) -> State:
        """How it stands."""
        if need in self.versions:
            return "ready"
        if need in self.problems:
            return "failed"
        return "training" if need in self._running else "missing"

    @property
    def n_trained(self) -> int:
        """By this sweep, in all its attempts."""
        return int(self._folder.recall("trained", 0))

    @property
    def has_room(self) -> bool:
        """Whether one more may be begun."""
        return len(self._running) < self._trainer.width

    def record(self, need: Need) -> EncoderRecord:
        """The catalog's record of one that is ready."""
        return self._catalog.encoder(self.versions[need])[0]

    # -- making them ---------------------------------------------------------------------------------------------------

    def set_aside(self, needs: Sequence[Need]) -> None:
        """Reserve the budget of all of them, or of none. Raises `BudgetExceededError`."""
        before = set(self._folder.recall("reservations", {}))
        try:
            for need in needs:
                plan = self._plan(need)
                if plan is not None and not self.is_published(need):
                    self._budget.set_aside(plan, self.recipe(need).key)
        except MetaMorphosisError:
            for part in set(self._folder.recall("reservations", {})) - before:
                self._budget.release(part)
            raise

    def want(self, need: Need) -> None:
        """Begin to make it, unless it is there, is being made, or cannot be."""
        if self.state(need) != "missing":
            return
        recipe = self.recipe(need)
        if recipe.key in self._known and self._take_from_catalog(need, recipe):
            return
        try:
            plan = self._plan(need)
            plan = None if plan is None else self._budget.reserve(plan, recipe.key)
        except MetaMorphosisError as error:
            self.problems[need] = str(error)
            return
        runtime = self._settings.runtime
        job = recipe.job(self._data, plan, device=runtime.device, threads=runtime.threads)
        self._tell(need, "training")
        self._running[need] = self._trainer.start(job)

    def settle(self) -> list[Need]:
        """Publish what was trained since the last call, and return it with what failed."""
        done = [need for need, future in self._running.items() if future.done()]
        for need in done:
            future = self._running.pop(need)
            error = future.exception()
            if error is None:
                self._keep(need, future.result())
            elif isinstance(error, Exception):
                self.problems[need] = f"the encoder ({need.words}) was not trained: {error}"
                self._tell(need, "failed")
            else:
                raise error
        return done

    def release(self) -> None:
        """Give back what was reserved and is not needed any more: the sweep is over."""
        for part in self._folder.recall("reservations", {}):
            self._budget.release(part)

    def note_outside(self, *notes: str) -> None:
        """In the ledger: what no accountant covers."""
        self._budget.outside(*notes)

    def _plan(self, need: Need) -> DpPlan | None:
        recipe = self.recipe(need)
        if not recipe.is_private:
            return None
        return recipe.plan(secret=self._folder.secret(recipe.key, fixed=recipe.dp.noise_seed))

    def _keep(self, need: Need, result: EncoderResult) -> None:
        """In the catalog for good, then in the store for trials: a driver that dies between the two finds it there."""
        recipe = self.recipe(need)
        guarantee = self._guarantee(recipe, result.accountant)
        module = None
        if recipe.private in result.modules:
            config = recipe.network.module_config(self._data.image_size)
            module = (config, result.modules[recipe.private])
        encoder = Encoder(weights=result.encoder, guarantee=guarantee, private_module=module)
        self._publish(recipe, encoder, result)
        self._store.write_state(encoder_file(recipe.key), encoder.to_state(), kind=Encoder.KIND)
        self.versions[need] = self._known[recipe.key]
        self._budget.release(recipe.key)
        self._folder.remember(trained=self.n_trained + 1)
        self._tell(need, "ready")

    def _publish(self, recipe: Recipe, encoder: Encoder, result: EncoderResult) -> None:
        record = encoder_record(
            settings=self._settings.data,
            private=recipe.private,
            table=self._opened.table,
            network=recipe.network,
            guarantee=encoder.guarantee,
            run_id=self._run_id,
        )
        record = dataclasses.replace(record, data={**record.data, RECIPE: recipe.key})
        published = self._catalog.publish_encoder(record, encoder.weights)
        if encoder.private_module is not None:
            self._budget.outside(without_noise(encoder.guarantee.excludes))
            entry = entry_of_phase_one(
                self._data, recipe.private, recipe.network, result, private=True, guarantee=encoder.guarantee
            )
            self._catalog.publish_tasks(published.version, [entry], expected=frozenset())
        self._known[recipe.key] = published.version

    def _take_from_catalog(self, need: Need, recipe: Recipe) -> bool:
        """Into the store, if it is not there: trials need not know the catalog. False if half of it is missing."""
        version = self._known[recipe.key]
        if not recipe.is_private and recipe.private not in self._catalog.tasks(version):
            return False  # its driver died before the private attribute's module was published
        if not self._store.exists(encoder_file(recipe.key)):
            record, weights = self._catalog.encoder(version)
            module = None
            if recipe.private in self._catalog.tasks(version):
                task, state, _ = self._catalog.load_task(version, recipe.private)
                module = (ModuleConfig.from_json(dict(task.module_config)), state)
            guarantee = Guarantee.from_json(dict(record.guarantee))
            encoder = Encoder(weights=weights, guarantee=guarantee, private_module=module)
            self._store.write_state(encoder_file(recipe.key), encoder.to_state(), kind=Encoder.KIND)
        self.versions[need] = version
        self._tell(need, "found")
        return True

    def _guarantee(self, recipe: Recipe, accounted: Mapping[str, Any] | None) -> Guarantee:
        accountant = None
        if accounted is not None:
            accountant = Accountant(recipe.dp.accountant)
            accountant.load_state_dict(accounted)
        return guarantee_for(recipe.dp, accountant=accountant, n_train=recipe.n_train)
