"""Publishing tasks that were trained apart from all that were there before them, whoever else publishes meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from orchestrator.assembly import SessionPlan
from orchestrator.catalog import Catalog
from orchestrator.catalog_records import EncoderRecord, TaskEntry, TaskRecord
from orchestrator.errors import PublishConflictError
from orchestrator.release import NoisePlan
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import NOBODY, OpenConsumer
from orchestrator.runs.phase_two import SessionResult, run_session, with_epochs
from orchestrator.runs.publishing import check_unpublished, fixed_modules
from orchestrator.settings.shared import RuntimeSettings

_ATTEMPTS = 5


def publish_apart(
    plan: SessionPlan,
    session: SessionResult,
    *,
    encoder: EncoderRecord,
    entries: Callable[[SessionResult], Sequence[TaskEntry]],
    catalog: Catalog,
    runtime: RuntimeSettings,
    observer: RunObserver,
    run_id: str,
    remote: Mapping[str, OpenConsumer] = NOBODY,
) -> tuple[list[TaskRecord], SessionResult]:
    """Publish what a session trained, by compare-and-swap.

    If somebody published another task since the session began, the new pairs are trained apart for a few epochs more,
    unless the modules are finished, and publication is tried again. Returns what was published, and the session that
    trained it last.
    """
    for _ in range(_ATTEMPTS):
        observer.on_stage("publishing")
        try:
            expected = frozenset(plan.fixed_modules)
            records = catalog.publish_tasks(encoder.version, entries(session), expected=expected, run_id=run_id)
        except PublishConflictError:
            published = catalog.tasks(encoder.version)
            check_unpublished(encoder, published, tuple(plan.data.specs), private=tuple(plan.data.specs))
            newcomers = ", ".join(sorted(set(published) - expected))
            if plan.modules is not None:
                # Trained under DP: to push them further apart would be a further private training.
                observer.on_stage(f"{newcomers} was published meanwhile; the modules stay as they are")
                plan = dataclasses.replace(plan, fixed_modules=fixed_modules(catalog, encoder, published))
                continue
            observer.on_stage(f"keeping {', '.join(plan.data.specs)} apart from {newcomers}, published meanwhile")
            plan = dataclasses.replace(
                with_epochs(plan, plan.config.epochs + plan.config.conflict_epochs),
                fixed_modules=fixed_modules(catalog, encoder, published),
                noise=_noise_apart_from(plan.noise, newcomers),
            )
            session = run_session(plan, runtime, observer, state=session.state, remote=remote)
            continue
        return records, session
    raise PublishConflictError(
        f"{', '.join(plan.data.specs)} was overtaken {_ATTEMPTS} times by others' publications; run the command again"
    )


def _noise_apart_from(noise: NoisePlan | None, newcomers: str) -> NoisePlan | None:
    """Other noise for each who came: a run that dies here and is resumed may meet others, and train other weights.

    The difference of two features that other weights made under the same noise would hold none.
    """
    return None if noise is None else dataclasses.replace(noise, run=f"{noise.run}, apart from {newcomers}")
