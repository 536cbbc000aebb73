"""Train an encoder and the tasks behind it, and publish both (MetaMorphosis, Algorithm 2).

algorithm   phase 1                             phase 2
both        E on the private attribute, DP      g_i, M_i on the frozen E, with the dissimilarity term
task        -                                   E, g_i, M_i jointly, no DP, with the dissimilarity term
input       whole, two_budget: E, g_i, M_i, DP  -
            encoder_only_paper: -               E, g_i with DP from live consumers; no guarantee
            other modes: as both                g_i, M_i on the frozen E, no dissimilarity term

In surrogate_dp_modules the g_i of phase 2 are trained with DP, and then the M_i on what these give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orchestrator.assembly import SessionPlan, TrainingData
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskEntry, TaskRecord
from orchestrator.checkpoint import load_tensors
from orchestrator.encoder_training import EncoderResult
from orchestrator.models.modules import ModuleConfig
from orchestrator.network import NetworkConfig
from orchestrator.privacy.accounting import Accountant, History
from orchestrator.privacy.guarantee import COVERS_ALL, Guarantee, guarantee_for
from orchestrator.privacy.plan import DpPlan
from orchestrator.runs.apart import publish_apart
from orchestrator.runs.budget import Budget, without_noise
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.noise import noise_plan
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import NOBODY, OpenConsumer, OpenData, RemoteTenant, open_data, open_public
from orchestrator.runs.phase_two import SessionResult, run_session
from orchestrator.runs.private_modules import PART, run_job, spent_before, train_modules_first
from orchestrator.runs.publishing import (
    check_unpublished,
    encoder_record,
    entry_of_phase_one,
    fixed_modules,
    guarantee_of,
    network_of,
    notes_on_bounded,
    promised_by,
    settings_of,
    task_entry,
    task_privacy_words,
    with_bound,
)
from orchestrator.settings.train import TrainSettings
from orchestrator.shaping import ShapingPlan
from orchestrator.tracking import Tracker
from orchestrator.train_job import EncoderJob
from orchestrator.updates import make_plan, poisson_schedule


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a run published."""

    encoder: EncoderRecord
    tasks: tuple[TaskRecord, ...]
    guarantee: Guarantee
    session: SessionResult | None = field(repr=False)


class TrainRun:
    """One run of `TrainSettings`. The phases are methods so that a run reads as Algorithm 2 does."""

    def __init__(
        self,
        settings: TrainSettings,
        *,
        catalog: Catalog,
        tracker: Tracker,
        observer: RunObserver,
        tenants: Mapping[str, RemoteTenant] = NOBODY,
    ) -> None:
        """``tenants`` are those who train their heads elsewhere: their tasks are published without a head."""
        self.settings, self.catalog, self.tracker, self.observer = settings, catalog, tracker, observer
        self.tenants = tenants
        self.private = (settings.private,) if settings.private is not None else ()
        self.network = settings.network
        self.opened: OpenData
        self.folder: RunFolder
        self.remote: Mapping[str, OpenConsumer]
        """What opens the consumers of tenants elsewhere, who find their states again by the run's name."""

    def run(self) -> TrainOutcome:
        """All phases that were asked for, or what an interrupted run of the same settings had left to do."""
        settings = self.settings
        with RunFolder.open("train", settings, settings.runtime, resume=settings.resume) as self.folder:
            self.folder.tracked_by(self.tracker.run_id)
            self.remote = {task: tenant(self.folder.run) for task, tenant in self.tenants.items()}
            if settings.phase == "tasks":
                return self._phase_two(settings.encoder_version)
            self.opened = open_data(settings.data, self.observer)
            data = self.opened.training_data([*self.private, *settings.tasks])
            match settings.algorithm, settings.dp.dp_mode:
                case ("task", _):
                    return self._train_jointly(data, private=False)
                case ("input", "encoder_only_paper"):
                    return self._train_jointly(data, private=True)
                case _ if settings.wholly_private:
                    return self._train_wholly_private(data)
                case _:
                    return self._two_phases(data)

    # -- the branches of Algorithm 2 -------------------------------------------------------------------------------

    def _two_phases(self, data: TrainingData) -> TrainOutcome:
        """Lines 8-10: phase 1 on the private attribute, phase 2 against the frozen encoder.

        The encoder is published as soon as it is trained: its budget is spent, and phase 2 may be run again.
        """
        if self._private_modules and self.settings.phase == "all":
            self._modules_plan(before=None)  # a run that would end without modules does not begin
        result = self._phase_one(data, self.private or self.settings.tasks)
        guarantee = self._guarantee(result.accountant)
        encoder = self._publish_encoder(result.encoder, guarantee)
        private = self._publish(
            encoder, [self._entry_of_phase_one(data, task, result, guarantee) for task in result.modules]
        )
        if self.settings.phase == "encoder":
            return TrainOutcome(encoder=encoder, tasks=tuple(private), guarantee=guarantee, session=None)
        return self._phase_two(encoder.version)

    def _phase_two(self, encoder_version: str) -> TrainOutcome:
        """Modules and heads against a published, frozen encoder; apart from every task that it already has."""
        encoder, weights = self.catalog.encoder(self.folder.recall("encoder_version", encoder_version))
        published = self.catalog.tasks(encoder.version)
        guarantee = guarantee_of(encoder, task_privacy=self.settings.task_privacy.dissimilarity)
        private = tuple(t for t in self.private if not (t in published and published[t].private))
        tasks = (*private, *self.settings.tasks)
        if done := self._published_before(published, tasks):
            promised = promised_by(done, else_by=guarantee)
            return TrainOutcome(encoder=encoder, tasks=done, guarantee=promised, session=None)
        check_unpublished(encoder, published, tasks, private=private)
        # An interrupted run goes on with the tasks that it knew of: what came since was published meanwhile.
        apart_from = self.folder.recall("apart_from", sorted(published))
        self.folder.remember(encoder_version=encoder.version, apart_from=apart_from)
        known = {t: r for t, r in published.items() if t in apart_from}
        self.network = network_of(encoder, head=self.settings.network.head, module=self.settings.network.module)
        if not hasattr(self, "opened"):
            where = settings_of(encoder, self.settings.data.data)
            self.opened = open_data(where, self.observer, fingerprint=encoder.data_fingerprint)
        data = self.opened.training_data(tasks)
        plan = self._session_plan(data, encoder=weights, fixed=fixed_modules(self.catalog, encoder, known))
        if self._private_modules:
            before = spent_before(encoder, known, self.settings.task_privacy.dissimilarity)
            plan, guarantee = self._modules(plan, guarantee, before)
        else:
            self._budget.outside(without_noise([f"module and head of {task}" for task in tasks]))
        records, session = publish_apart(
            plan,
            self._session(plan),
            encoder=encoder,
            entries=lambda trained: self._entries(data, trained, guarantee),
            catalog=self.catalog,
            runtime=self.settings.runtime,
            observer=self.observer,
            run_id=self.tracker.run_id,
            remote=self.remote,
        )
        promised = promised_by(records, else_by=guarantee)
        return TrainOutcome(encoder=encoder, tasks=tuple(records), guarantee=promised, session=session)

    def _modules(self, plan: SessionPlan, encoder: Guarantee, before: History) -> tuple[SessionPlan, Guarantee]:
        """The modules under DP; then the session that is left to do, and what encoder and modules promise together."""
        mechanism = self._modules_plan(before=before if self.settings.phase == "tasks" else None)
        return train_modules_first(
            plan,
            dataclasses.replace(mechanism, before=before),
            self.settings.dp,
            encoder=encoder,
            runtime=self.settings.runtime,
            folder=self.folder,
            budget=self._budget,
            observer=self.observer,
        )

    def _train_jointly(self, data: TrainingData, *, private: bool) -> TrainOutcome:
        """Lines 5-7 without DP (task privacy only), lines 1-4 with it (live consumers; no guarantee)."""
        dp = self._plan(self.settings.training, part="session") if private else None
        session = self._session(dataclasses.replace(self._session_plan(data, encoder=None), frozen=False, dp=dp))
        self._budget.release("session")
        guarantee = self._guarantee(session.state["producer"]["accountant"])
        encoder = self._publish_encoder(session.encoder_weights(), guarantee)
        records = self._publish(encoder, self._entries(data, session, guarantee))
        promised = promised_by(records, else_by=guarantee)
        return TrainOutcome(encoder=encoder, tasks=tuple(records), guarantee=promised, session=session)

    def _train_wholly_private(self, data: TrainingData) -> TrainOutcome:
        """Lines 1-4 with the heads under DP too, so that encoder, modules and heads are all covered."""
        result = self._phase_one(data, tuple(data.specs))
        guarantee = self._guarantee(result.accountant)
        encoder = self._publish_encoder(result.encoder, guarantee)
        records = self._publish(
            encoder, [self._entry_of_phase_one(data, task, result, guarantee) for task in data.specs]
        )
        return TrainOutcome(encoder=encoder, tasks=tuple(records), guarantee=guarantee, session=None)

    # -- steps of a branch -----------------------------------------------------------------------------------------

    @property
    def _tasks_network(self) -> NetworkConfig:
        """The networks of a session, the private attribute's among them, so that its feature can be compared.

        Those of phase 1 are never bounded: nobody buys what they give.
        """
        return self.settings.task_privacy.network(self.network)

    @property
    def _shaping(self) -> ShapingPlan:
        """Nothing for modules under DP: its terms look at several images at a time."""
        if self._private_modules:
            return ShapingPlan()
        asked = self.settings.task_privacy
        return asked.shaping(self.opened.secrets(asked.named_secrets))

    @property
    def _private_modules(self) -> bool:
        return self.settings.dp.dp_mode == "surrogate_dp_modules" and self.settings.dp.epsilon is not None

    def _plan(self, training: Any, *, part: str, **composed: Any) -> DpPlan | None:
        """The private training of one part, its budget reserved; None where it is trained without DP."""
        dp = self.settings.dp
        plan = make_plan(
            dp,
            n_train=len(self.opened.splits.train),
            batch_size=training.batch_size,
            epochs=training.epochs,
            secret=self.folder.secret(part, fixed=dp.noise_seed) if dp.epsilon is not None else None,
            **composed,
        )
        return None if plan is None else self._budget.reserve(plan, part)

    def _encoder_plan(self) -> DpPlan | None:
        """Of phase 1. With surrogate_dp_modules, epsilon has to last for the modules as well."""
        return self._plan(self.settings.encoder, part="encoder", **self._beside(self.settings.training))

    def _modules_plan(self, *, before: History | None) -> DpPlan:
        """Of the modules: after an encoder that cost ``before``, or with the same noise as this run's own encoder."""
        composed = self._beside(self.settings.encoder) if before is None else {"before": before}
        plan = self._plan(self.settings.training, part=PART, **composed)
        assert plan is not None
        return plan

    def _beside(self, other: Any) -> dict[str, Any]:
        if not self._private_modules:
            return {}
        n = len(self.opened.splits.train)
        return {"alike": (poisson_schedule(n, batch_size=other.batch_size, epochs=other.epochs),)}

    @property
    def _budget(self) -> Budget:
        return Budget(self.opened.table, self.folder, self.settings.runtime)

    def _leave_out(self, guarantee: Guarantee) -> None:
        """Note in the ledger what this run trains on the images without noise."""
        if guarantee.excludes:
            self._budget.outside(without_noise(guarantee.excludes))

    def _phase_one(self, data: TrainingData, labelled: tuple[str, ...]) -> EncoderResult:
        self.observer.on_stage("phase 1: the encoder")
        settings, runtime = self.settings, self.settings.runtime
        public, head_weights = self._public(labelled), self._head_weights()
        job = EncoderJob(
            data=TrainingData.of(self.opened.table, data.rows, labelled),
            network=self.network,
            config=settings.encoder,
            plan=self._encoder_plan(),
            surrogate_head=settings.dp.surrogate,
            seed=settings.seed,
            device=runtime.device,
            threads=runtime.threads,
            workers=runtime.encoder_workers,
            restarts=runtime.restarts,
            checkpoints=self.folder.checkpoints("encoder", identity=self.opened.table.fingerprint),
            checkpoint_steps=runtime.checkpoint_steps,
            public=public,
            head_weights=head_weights,
        )
        result = run_job(job, runtime, self.observer, name=f"encoder-{self.tracker.run_id}")
        self._budget.release("encoder")
        return result

    def _public(self, labelled: tuple[str, ...]) -> TrainingData | None:
        source = self.settings.dp.public_data
        return None if source is None else open_public(source, self.opened, labelled, self.settings.data)

    def _head_weights(self) -> Mapping[str, Tensor] | None:
        path = self.settings.dp.head_weights
        return None if path is None else load_tensors(path)

    def _session_plan(
        self,
        data: TrainingData,
        *,
        encoder: Mapping[str, Tensor] | None,
        fixed: Mapping[str, tuple[ModuleConfig, Mapping[str, Tensor]]] | None = None,
    ) -> SessionPlan:
        runtime = self.settings.runtime
        return SessionPlan(
            data=data,
            network=self._tasks_network,
            config=self.settings.training,
            dissimilarity=self.settings.task_privacy.dissimilarity,
            seed=self.settings.seed,
            encoder=encoder,
            frozen=encoder is not None,
            fixed_modules=fixed or {},
            cache_root=runtime.storage_path / "features",
            device=runtime.device,
            threads=runtime.threads,
            noise=noise_plan(self._tasks_network, self.catalog, storage=runtime.storage_path, run=self.folder.run),
            shaping=self._shaping,
        )

    def _session(self, plan: SessionPlan) -> SessionResult:
        self.observer.on_stage("phase 2: the tasks")
        for told in notes_on_bounded(plan):
            self.observer.on_stage(told)
        checkpoints = self.folder.checkpoints("session", identity=plan.data.fingerprint)
        return run_session(plan, self.settings.runtime, self.observer, checkpoints=checkpoints, remote=self.remote)

    def _guarantee(self, accounted: Mapping[str, Any] | None) -> Guarantee:
        """From what the accountant really counted."""
        dp = self.settings.dp
        accountant = None
        if accounted is not None:
            accountant = Accountant(dp.accountant)
            accountant.load_state_dict(accounted)
        later = bool(self.private) and dp.dp_mode in COVERS_ALL and not self.settings.wholly_private
        return guarantee_for(
            dp,
            accountant=accountant,
            n_train=len(self.opened.splits.train),
            task_privacy=task_privacy_words(self.settings.task_privacy.dissimilarity),
            # What phase 2 adds to the encoder is no part of what phase 1 promises.
            mode="surrogate_then_freeze" if self._private_modules else None,
            covers=("encoder", "the private attribute's module", "its classifier") if later else None,
            excludes=("the tasks' modules", "the tasks' heads") if later else None,
        )

    def _publish_encoder(self, weights: Mapping[str, Tensor], guarantee: Guarantee) -> EncoderRecord:
        """Once, however often the run was interrupted."""
        self.observer.on_stage("publishing")
        self._leave_out(guarantee)
        before = [r for r in self.catalog.encoders() if self.folder.published_here(r.run_id)]
        if before:
            return before[-1]
        record = encoder_record(
            settings=self.settings.data,
            private=self.settings.private,
            table=self.opened.table,
            network=self.network,
            guarantee=guarantee,
            run_id=self.tracker.run_id,
        )
        return self.catalog.publish_encoder(record, weights)

    def _entries(self, data: TrainingData, session: SessionResult, guarantee: Guarantee) -> list[TaskEntry]:
        """Of every task but those in quarantine, which are not published."""
        self.folder.remember(quarantined=sorted(session.quarantined))
        for task, reason in session.quarantined.items():
            self.observer.on_stage(f"{task} is in quarantine and is not published: {reason}")
        return [self._entry(data, task, session, guarantee) for task in data.specs if task not in session.quarantined]

    def _entry(self, data: TrainingData, task: str, session: SessionResult, guarantee: Guarantee) -> TaskEntry:
        module_config = self._tasks_network.module_config(data.image_size)
        return task_entry(
            data.specs[task],
            private=task in self.private,
            module_config=module_config,
            module_state=session.module_weights(task),
            head=session.heads.get(task),
            metrics=session.test[task].metrics,
            guarantee=with_bound(
                guarantee,
                module_config,
                epochs=session.trained_epochs,
                noise_kind=self.settings.task_privacy.feature_noise_kind,
                shaping=self._shaping,
            ),
            dissimilarity=self.settings.task_privacy.dissimilarity,
        )

    def _entry_of_phase_one(
        self, data: TrainingData, task: str, result: EncoderResult, guarantee: Guarantee
    ) -> TaskEntry:
        private = task in self.private
        return entry_of_phase_one(data, task, self.network, result, private=private, guarantee=guarantee)

    def _publish(self, encoder: EncoderRecord, entries: Sequence[TaskEntry]) -> Sequence[TaskRecord]:
        """Tasks that belong to the encoder from the beginning: nobody else can have known it."""
        names = tuple(entry.spec.name for entry in entries)
        if done := self._published_before(self.catalog.tasks(encoder.version), names):
            return done
        self.observer.on_stage("publishing")
        return self.catalog.publish_tasks(encoder.version, entries, expected=frozenset()) if entries else ()

    def _published_before(self, published: Mapping[str, TaskRecord], tasks: Sequence[str]) -> tuple[TaskRecord, ...]:
        """These tasks, if an earlier process of this very run published them before it died."""
        tasks = [t for t in tasks if t not in self.folder.recall("quarantined", [])]
        mine = [published[t] for t in tasks if t in published and self.folder.published_here(published[t].run_id)]
        return tuple(mine) if len(mine) == len(tasks) else ()
