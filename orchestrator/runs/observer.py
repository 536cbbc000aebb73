"""Who is told how a run goes: the terminal, the tracker, a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestrator.encoder_training import EncoderEpoch
from orchestrator.ports import StepReport
from orchestrator.session import EpochReport


class RunObserver(Protocol):
    """Told of progress; it cannot change the run."""

    def on_stage(self, title: str) -> None:
        """Something of another kind begins."""
        ...

    def on_encoder_progress(self, step: int, total_steps: int, epoch: EncoderEpoch | None) -> None:
        """Phase 1 went on; ``epoch`` if one just ended."""
        ...

    def on_session_start(self, tasks: Sequence[str], total_steps: int, first_step: int) -> None:
        """Phase 2 begins, or goes on at ``first_step``."""
        ...

    def on_step(self, report: StepReport) -> None:
        """A step of phase 2 was applied."""
        ...

    def on_epoch(self, report: EpochReport) -> None:
        """An epoch of phase 2 ended."""
        ...


class SilentObserver:
    """Told of everything, says nothing."""

    def on_stage(self, title: str) -> None:
        """Ignore it."""

    def on_encoder_progress(self, step: int, total_steps: int, epoch: EncoderEpoch | None) -> None:
        """Ignore it."""

    def on_session_start(self, tasks: Sequence[str], total_steps: int, first_step: int) -> None:
        """Ignore it."""

    def on_step(self, report: StepReport) -> None:
        """Ignore it."""

    def on_epoch(self, report: EpochReport) -> None:
        """Ignore it."""


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: RunObserver) -> None:
        self._observers = observers

    def on_stage(self, title: str) -> None:
        """Tell everyone."""
        for observer in self._observers:
            observer.on_stage(title)

    def on_encoder_progress(self, step: int, total_steps: int, epoch: EncoderEpoch | None) -> None:
        """Tell everyone."""
        for observer in self._observers:
            observer.on_encoder_progress(step, total_steps, epoch)

    def on_session_start(self, tasks: Sequence[str], total_steps: int, first_step: int) -> None:
        """Tell everyone."""
        for observer in self._observers:
            observer.on_session_start(tasks, total_steps, first_step)

    def on_step(self, report: StepReport) -> None:
        """Tell everyone."""
        for observer in self._observers:
            observer.on_step(report)

    def on_epoch(self, report: EpochReport) -> None:
        """Tell everyone."""
        for observer in self._observers:
            observer.on_epoch(report)
