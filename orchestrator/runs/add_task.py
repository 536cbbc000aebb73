"""Add one task to a published encoder. Every task that was there before stays as it is, byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.assembly import SessionPlan
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskEntry, TaskRecord
from orchestrator.errors import CheckpointError
from orchestrator.privacy.accounting import History
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.runs.apart import publish_apart
from orchestrator.runs.budget import Budget, without_noise
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.noise import noise_plan
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import NOBODY, OpenConsumer, OpenData, RemoteTenant, open_data
from orchestrator.runs.phase_two import SessionResult, run_session
from orchestrator.runs.private_modules import PART, spent_before, train_modules_first
from orchestrator.runs.publishing import (
    check_unpublished,
    fixed_modules,
    guarantee_of,
    network_of,
    notes_on_bounded,
    promised_by,
    settings_of,
    task_entry,
    with_bound,
)
from orchestrator.settings.add_task import AddTaskSettings
from orchestrator.settings.task_privacy import TaskPrivacySettings
from orchestrator.updates import make_plan


@dataclass(frozen=True, kw_only=True)
class AddOutcome:
    """What was published, and the proof that nothing else changed."""

    encoder: EncoderRecord
    task: TaskRecord
    guarantee: Guarantee
    unchanged: dict[str, str]
    """Artefact of every earlier task to its SHA-256, the same before and after."""
    session: SessionResult | None
    """None where an earlier process of this run had published the task before it died."""


def add_task(
    settings: AddTaskSettings,
    *,
    catalog: Catalog,
    observer: RunObserver,
    run_id: str,
    tenant: RemoteTenant | None = None,
) -> AddOutcome:
    """Train ``settings.task`` against the frozen encoder and publish it.

    ``tenant`` is one that trains its head elsewhere: the task is then published without a head. It is never published
    without having been kept apart from every task that was there before it; see `publish_apart`.
    """
    with RunFolder.open("add", settings, settings.runtime, resume=settings.resume) as folder:
        folder.tracked_by(run_id)
        remote = NOBODY if tenant is None else {settings.task: tenant(folder.run)}
        return _add_task(settings, folder, catalog=catalog, observer=observer, run_id=run_id, remote=remote)


def _add_task(
    settings: AddTaskSettings,
    folder: RunFolder,
    *,
    catalog: Catalog,
    observer: RunObserver,
    run_id: str,
    remote: Mapping[str, OpenConsumer],
) -> AddOutcome:
    encoder, weights = catalog.encoder(folder.recall("encoder_version", settings.encoder_version))
    guarantee = guarantee_of(encoder, task_privacy=settings.task_privacy.dissimilarity)
    published = catalog.tasks(encoder.version)
    before = folder.recall("before") or catalog.published_hashes(encoder.version)
    mine = published.get(settings.task)
    if mine is not None and folder.published_here(mine.run_id):
        unchanged = _check_unchanged(catalog, encoder.version, before)
        promised = Guarantee.from_json(dict(mine.guarantee))
        return AddOutcome(encoder=encoder, task=mine, guarantee=promised, unchanged=unchanged, session=None)
    check_unpublished(encoder, published, (settings.task,))
    apart_from = folder.recall("apart_from", sorted(published))
    folder.remember(encoder_version=encoder.version, apart_from=apart_from, before=before)
    known = {task: record for task, record in published.items() if task in apart_from}
    opened = open_data(settings_of(encoder, settings.data), observer, fingerprint=encoder.data_fingerprint)
    network = settings.task_privacy.network(network_of(encoder, head=settings.head, module=settings.module))
    # Its terms look at several images at a time, so that modules under DP do without.
    asked = settings.task_privacy if settings.dp.epsilon is None else TaskPrivacySettings()
    shaping = asked.shaping(opened.secrets(asked.named_secrets))
    plan = SessionPlan(
        data=opened.training_data((settings.task,)),
        network=network,
        config=settings.training,
        dissimilarity=settings.task_privacy.dissimilarity,
        seed=settings.seed,
        encoder=weights,
        fixed_modules=fixed_modules(catalog, encoder, known),
        cache_root=settings.runtime.storage_path / "features",
        device=settings.runtime.device,
        threads=settings.runtime.threads,
        noise=noise_plan(network, catalog, storage=settings.runtime.storage_path, run=folder.run),
        shaping=shaping,
    )

    if settings.dp.epsilon is not None:
        spent = spent_before(encoder, known, settings.task_privacy.dissimilarity)
        plan, guarantee = _under_dp(settings, plan, guarantee, spent, opened, folder, observer)
    else:
        Budget(opened.table, folder, settings.runtime).outside(without_noise([f"module and head of {settings.task}"]))

    def entries(session: SessionResult) -> list[TaskEntry]:
        module_config = network.module_config(plan.data.image_size)
        return [
            task_entry(
                plan.data.specs[settings.task],
                private=False,
                module_config=module_config,
                module_state=session.module_weights(settings.task),
                head=session.heads.get(settings.task),
                metrics=session.test[settings.task].metrics,
                guarantee=with_bound(
                    guarantee,
                    module_config,
                    epochs=session.trained_epochs,
                    noise_kind=settings.task_privacy.feature_noise_kind,
                    shaping=shaping,
                ),
                dissimilarity=settings.task_privacy.dissimilarity,
            )
        ]

    for told in notes_on_bounded(plan):
        observer.on_stage(told)
    observer.on_stage(f"training {settings.task}")
    (record,), session = publish_apart(
        plan,
        run_session(
            plan,
            settings.runtime,
            observer,
            checkpoints=folder.checkpoints("session", identity=plan.data.fingerprint),
            remote=remote,
        ),
        encoder=encoder,
        entries=entries,
        catalog=catalog,
        runtime=settings.runtime,
        observer=observer,
        run_id=run_id,
        remote=remote,
    )
    return AddOutcome(
        encoder=encoder,
        task=record,
        guarantee=promised_by([record], else_by=guarantee),
        unchanged=_check_unchanged(catalog, encoder.version, before),
        session=session,
    )


def _under_dp(
    settings: AddTaskSettings,
    plan: SessionPlan,
    guarantee: Guarantee,
    spent: History,
    opened: OpenData,
    folder: RunFolder,
    observer: RunObserver,
) -> tuple[SessionPlan, Guarantee]:
    """The module under DP; then the session that is left to do, and what encoder and module promise together."""
    budget, dp = Budget(opened.table, folder, settings.runtime), settings.dp
    mechanism = make_plan(
        dp,
        n_train=len(opened.splits.train),
        batch_size=settings.training.batch_size,
        epochs=settings.training.epochs,
        secret=folder.secret(PART, fixed=dp.noise_seed),
    )
    assert mechanism is not None
    return train_modules_first(
        plan,
        dataclasses.replace(budget.reserve(mechanism, PART), before=spent),
        dp,
        encoder=guarantee,
        added=settings.task,
        runtime=settings.runtime,
        folder=folder,
        budget=budget,
        observer=observer,
    )


def _check_unchanged(catalog: Catalog, encoder_version: str, before: dict[str, str]) -> dict[str, str]:
    """Read every earlier artefact again and compare. Raises if one byte differs."""
    after = catalog.published_hashes(encoder_version)
    changed = sorted(name for name, digest in before.items() if after.get(name) != digest)
    if changed:
        raise CheckpointError(f"artefacts of earlier tasks changed while this one was added: {', '.join(changed)}")
    return before
