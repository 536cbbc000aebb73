"""Phase 2 of a run: a session from its plan to trained weights, with checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orchestrator.assembly import SessionPlan
from orchestrator.checkpoints import Checkpoints
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import NOBODY, OpenConsumer, open_parties
from orchestrator.session import EpochReport, Session
from orchestrator.settings.shared import RuntimeSettings
from orchestrator.wire import EvaluationReport, HeadWeights


@dataclass(frozen=True, kw_only=True)
class SessionResult:
    """What a session leaves behind."""

    weights: Mapping[str, Tensor] = field(repr=False)
    """Of the producer's network; see `module_weights` and `encoder_weights`."""
    heads: Mapping[str, HeadWeights] = field(repr=False)
    """Of the tasks whose tenants left them here."""
    validation: Mapping[str, EvaluationReport]
    test: Mapping[str, EvaluationReport]
    epochs: list[EpochReport]
    trained_epochs: int
    """In all, those before an interruption included."""
    quarantined: Mapping[str, str]
    """Task to the reason why it was stopped; it has no head here, and must not be published."""
    state: Mapping[str, Any] = field(repr=False)
    """From which a further session goes on."""

    def module_weights(self, task: str) -> dict[str, Tensor]:
        """g_i's own weights."""
        return _under(self.weights, f"branches.task_{task}.")

    def encoder_weights(self) -> dict[str, Tensor]:
        """E's own weights; empty where the session worked on cached features."""
        return _under(self.weights, "encoder.")


def run_session(
    plan: SessionPlan,
    runtime: RuntimeSettings,
    observer: RunObserver,
    *,
    checkpoints: Checkpoints | None = None,
    state: Mapping[str, Any] | None = None,
    remote: Mapping[str, OpenConsumer] = NOBODY,
) -> SessionResult:
    """Train to the end of the plan: from the newest of ``checkpoints``, else from ``state``, else from its start.

    ``remote`` opens the consumers of tasks whose tenants are elsewhere; the others are hosted.
    """

    def save(step: int, kept: dict[str, Any]) -> None:
        complaint = checkpoints.try_save(step, kept) if checkpoints is not None else None
        if complaint is not None:
            observer.on_stage(complaint)

    saved = checkpoints.newest() if checkpoints is not None else None
    state = saved[1] if saved is not None else state
    with open_parties(plan, runtime, remote=remote) as (producer, consumers):
        session = Session(
            producer,
            consumers,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=plan.config.epochs,
            observers=(observer,),
            save=save,
            keep_every=runtime.checkpoint_steps,
            recoveries=runtime.restarts,
        )
        session.start(state)
        observer.on_session_start(sorted(plan.data.specs), plan.total_steps, session.step)
        epochs = session.run()
        outcome = session.finish()
    trained = session.step // plan.steps_per_epoch
    return SessionResult(
        epochs=epochs, trained_epochs=trained, **{f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}
    )


def with_epochs(plan: SessionPlan, epochs: int) -> SessionPlan:
    """The same plan, trained for so many epochs in all."""
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, epochs=epochs))


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
