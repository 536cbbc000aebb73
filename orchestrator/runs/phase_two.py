"""Phase 2 of a run: a session from its plan to trained weights, with checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from orchestrator.assembly import SessionPlan
from orchestrator.checkpoint import load_state, save_state
from orchestrator.config import to_mapping
from orchestrator.errors import ConfigError
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import open_parties
from orchestrator.session import EpochReport, Session
from orchestrator.settings import RuntimeSettings
from orchestrator.wire import EvaluationReport, HeadWeights

_KIND = "session"


@dataclass(frozen=True, kw_only=True)
class SessionResult:
    """What a session leaves behind."""

    weights: Mapping[str, Tensor] = field(repr=False)
    """Of the producer's network; see `module_weights` and `encoder_weights`."""
    heads: Mapping[str, HeadWeights] = field(repr=False)
    validation: Mapping[str, EvaluationReport]
    test: Mapping[str, EvaluationReport]
    epochs: list[EpochReport]
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
    checkpoint: Path | None = None,
    resume: bool = False,
    state: Mapping[str, Any] | None = None,
) -> SessionResult:
    """Train to the end of the plan, from its start, from ``state``, or from ``checkpoint`` if ``resume``."""
    with open_parties(plan, runtime) as (producer, consumers):
        session = Session(
            producer,
            consumers,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=plan.config.epochs,
            observers=(observer,),
            save=None if checkpoint is None else lambda _, saved: save_state(checkpoint, saved, kind=_KIND),
        )
        session.enrol(("train", "validation", "test"))
        if resume and checkpoint is not None:
            state = load_state(checkpoint, kind=_KIND)
        first = 0
        if state is not None:
            session.load_state_dict(dict(state))
            first = int(state["step"])
        observer.on_session_start(sorted(plan.data.specs), plan.total_steps, first)
        epochs = session.run()
        return SessionResult(
            weights=producer.weights(),
            heads={consumer.task: consumer.head().result() for consumer in consumers},
            validation=session.evaluate("validation"),
            test=session.evaluate("test"),
            epochs=epochs,
            state=session.state_dict(),
        )


def checkpoint_path(settings: Any, runtime: RuntimeSettings) -> Path:
    """Where a run with these settings keeps its checkpoint: other settings have another one."""
    mapping = to_mapping(settings)
    for ignored in ("runtime", "resume"):
        mapping.pop(ignored, None)
    digest = hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]
    return runtime.storage_path / "checkpoints" / f"session-{digest}"


def check_resumable(path: Path) -> None:
    """Raise unless there is a checkpoint there."""
    if not list(path.parent.glob(f"{path.name}*")):
        raise ConfigError(
            f"nothing to resume: no checkpoint at {path}. A run can be resumed with exactly the settings that it was "
            "started with, from the end of its first epoch on"
        )


def with_epochs(plan: SessionPlan, epochs: int) -> SessionPlan:
    """The same plan, trained for so many epochs in all."""
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, epochs=epochs))


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
