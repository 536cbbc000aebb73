"""How a run shows itself in the terminal: a bar while it works, a line an epoch that stays."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orchestrator.encoder_training import EncoderEpoch
from orchestrator.ports import StepReport
from orchestrator.session import EpochReport


class TerminalObserver:
    """Prints stages and epochs; animates the steps where the output is a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("", total=1, visible=False, note="")
        self._started = time.monotonic()

    @contextmanager
    def showing(self) -> Iterator[TerminalObserver]:
        """Show the bar inside the block, and leave the terminal as it was after it."""
        with self._progress:
            yield self

    def on_stage(self, title: str) -> None:
        """A heading, with the time since the run began."""
        self._progress.update(self._bar, visible=False)
        self.console.print(f"[bold]{title}[/bold] [dim]({time.monotonic() - self._started:.0f} s)[/dim]")

    def on_encoder_progress(self, step: int, total_steps: int, epoch: EncoderEpoch | None) -> None:
        """Phase 1's bar, and a line for the epoch that ended."""
        self._progress.update(
            self._bar, description="encoder", total=total_steps, completed=step, visible=True, note=""
        )
        if epoch is not None:
            parts = [_task_part(t, loss, epoch.metrics[t]) for t, loss in epoch.losses.items()]
            self.console.print(_line(epoch.epoch, parts, None, epoch.epsilon_spent))

    def on_session_start(self, tasks: Sequence[str], total_steps: int, first_step: int) -> None:
        """A new bar."""
        self._progress.reset(
            self._bar, description=", ".join(tasks), total=total_steps, completed=first_step, visible=True, note=""
        )

    def on_step(self, report: StepReport) -> None:
        """One step further."""
        note = "  ".join(f"{task} {loss:.3f}" for task, loss in report.losses.items())
        self._progress.update(self._bar, completed=report.step + 1, note=note)

    def on_epoch(self, report: EpochReport) -> None:
        """The line that stays."""
        parts = [_task_part(t, loss, report.validation[t].metrics) for t, loss in report.losses.items()]
        similarity = report.dissimilarity if report.dissimilarity_by_pair else None
        self.console.print(_line(report.epoch, parts, similarity, report.epsilon_spent))

    def on_attack(self, done: int, total: int, note: str) -> None:
        """One attacker more has been trained."""
        self._progress.update(
            self._bar, description="attackers", total=total, completed=done, visible=done < total, note=note
        )


def _task_part(task: str, loss: float, metrics: Mapping[str, float]) -> str:
    name, value = next(iter(metrics.items()))
    return f"{task}: loss {loss:.3f}, validation {name} {value:.3f}"


def _line(epoch: int, parts: Sequence[str], dissimilarity: float | None, epsilon: float) -> str:
    extra = []
    if dissimilarity is not None:
        extra.append(f"dissimilarity term {dissimilarity:.4f}")
    if epsilon > 0:
        extra.append(f"epsilon spent {epsilon:.2f}")
    return f"  epoch {epoch:>3}  " + " | ".join([*parts, *extra])
