"""Modules trained under DP in a run: stage 2 of surrogate_dp_modules, and tasks that are added with a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from orchestrator.assembly import SessionConfig, SessionPlan
from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.encoder_training import EncoderResult, EncoderTrainingConfig
from orchestrator.errors import PrivacyRefusal
from orchestrator.privacy.accounting import Accountant, History
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.dp import DpBudget
from orchestrator.privacy.guarantee import Guarantee, guarantee_for
from orchestrator.privacy.plan import DpPlan
from orchestrator.runs.budget import Budget, without_noise
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.publishing import task_privacy_words
from orchestrator.settings.shared import RuntimeSettings
from orchestrator.train_job import EncoderJob, ModuleJob, train_encoder, train_encoder_here

PART = "modules"
"""What the training is called in the run's folder and in the ledger."""


def train_modules_first(
    session: SessionPlan,
    plan: DpPlan,
    dp: DpBudget,
    *,
    encoder: Guarantee,
    added: str | None = None,
    runtime: RuntimeSettings,
    folder: RunFolder,
    budget: Budget,
    observer: RunObserver,
) -> tuple[SessionPlan, Guarantee]:
    """Train a session's modules under DP; then the session that is left to do, and what is promised of all of it.

    ``plan`` is the modules' own, its budget reserved, with what `spent_before` says; ``encoder`` is the encoder's
    guarantee. ``added`` is the one task that is added to it; None where the modules belong to it from the beginning.
    """
    observer.on_stage(f"the modules of {', '.join(session.data.specs)}, with differential privacy")
    job = _module_job(session, plan, surrogate=dp.surrogate, runtime=runtime, folder=folder)
    result = run_job(job, runtime, observer, name=f"{PART}-{folder.run}")
    budget.release(PART)
    budget.outside(without_noise([f"head of {task}" for task in session.data.specs]))
    # Nothing is pushed apart any more: the tenants' heads are all that is left to train.
    apart = DissimilarityConfig(omega=0.0)
    heads_only = dataclasses.replace(session, modules=result.modules, dissimilarity=apart)
    own = Accountant(dp.accountant)
    assert result.accountant is not None
    own.load_state_dict(result.accountant)
    words = task_privacy_words(session.dissimilarity)
    return heads_only, _guarantee(encoder, dp, before=plan.before, own=own.history, task_privacy=words, added=added)


def _module_job(
    session: SessionPlan, plan: DpPlan, *, surrogate: str, runtime: RuntimeSettings, folder: RunFolder
) -> ModuleJob:
    assert session.encoder is not None
    assert session.cache_root is not None
    return ModuleJob(
        data=session.data,
        network=session.network,
        config=_as_phase_one(session.config),
        plan=plan,
        surrogate_head=surrogate,
        seed=session.seed,
        device=runtime.device,
        threads=runtime.threads,
        workers=runtime.encoder_workers,
        restarts=runtime.restarts,
        checkpoints=folder.checkpoints(PART, identity=session.data.fingerprint),
        checkpoint_steps=runtime.checkpoint_steps,
        name=PART,
        encoder=session.encoder,
        dissimilarity=session.dissimilarity,
        fixed_modules=session.fixed_modules,
        cache_root=session.cache_root,
    )


def run_job(job: EncoderJob, runtime: RuntimeSettings, observer: RunObserver, *, name: str) -> EncoderResult:
    """The job in this process, or as a Ray Train job of that name."""
    progress, note = observer.on_encoder_progress, observer.on_stage
    if runtime.engine == "process":
        return train_encoder_here(job, progress=progress, note=note)
    storage: Path = runtime.storage_path / "train"
    return train_encoder(job, storage=storage, name=name, progress=progress, note=note)


def spent_before(encoder: EncoderRecord, fixed: Mapping[str, TaskRecord], apart: DissimilarityConfig) -> History:
    """Of all that a module knows of when its training begins: the encoder, and the modules that it is kept apart from.

    Raises `PrivacyRefusal` where one of them has no guarantee: what is learned from it would have none either.
    """
    guarantee = Guarantee.from_json(dict(encoder.guarantee))
    if guarantee.epsilon is None or not guarantee.mechanisms:
        raise PrivacyRefusal(
            f"encoder {encoder.version} has no guarantee ({guarantee.short()}), so a module trained on its features "
            "under DP would have none either: leave --epsilon out, or train an encoder under DP"
        )
    runs: dict[str, History] = {}
    for task, record in fixed.items() if apart.omega > 0 else ():
        known = Guarantee.from_json(dict(record.guarantee))
        if not _is_covered(known, private=record.private):
            raise PrivacyRefusal(
                f"the module of {task!r} was trained without noise, and a module that is kept apart from it learns "
                "from it: give --omega 0, or leave --epsilon out"
            )
        # Modules that were trained together are one mechanism.
        runs[record.run_id] = known.mechanisms[len(guarantee.mechanisms) :]
    return (*guarantee.mechanisms, *(run for extra in runs.values() for run in extra))


def _is_covered(guarantee: Guarantee, *, private: bool) -> bool:
    if private:
        return any("module" in part for part in guarantee.covers)
    return guarantee.epsilon is not None and not any("module" in part for part in guarantee.excludes)


def _guarantee(
    encoder: Guarantee, dp: DpBudget, *, before: History, own: History, task_privacy: str, added: str | None
) -> Guarantee:
    """What encoder and modules promise together."""
    guarantee = guarantee_for(
        dataclasses.replace(dp, delta=dp.delta if dp.delta is not None else encoder.delta),
        accountant=Accountant.of(dp.accountant, before, own),
        n_train=encoder.n_train,
        task_privacy=task_privacy,
        covers=None if added is None else (*encoder.covers, f"the module of {added}"),
        excludes=None if added is None else (f"the head of {added}",),
    )
    return dataclasses.replace(
        guarantee,
        mechanisms=(*before, *own),
        reproducible_noise=guarantee.reproducible_noise or encoder.reproducible_noise,
    )


def _as_phase_one(config: SessionConfig) -> EncoderTrainingConfig:
    return EncoderTrainingConfig(
        epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, weight_decay=config.weight_decay
    )
