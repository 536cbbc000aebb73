"""What a run looked like over time: for the tracker, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.encoder_training import EncoderEpoch
from orchestrator.ports import StepReport
from orchestrator.session import EpochReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from orchestrator.tracking import Tracker


class History:
    """An observer that keeps every epoch, and sends its numbers to the tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.encoder: list[EncoderEpoch] = []
        self.session: list[EpochReport] = []

    def on_stage(self, title: str) -> None:
        """Not a number."""

    def on_encoder_progress(self, step: int, total_steps: int, epoch: EncoderEpoch | None) -> None:
        """Keep and send the epoch that ended."""
        if epoch is not None:
            self.encoder.append(epoch)
            self._tracker.log_metrics(epoch.epoch, encoder_metrics(epoch))

    def on_session_start(self, tasks: Sequence[str], total_steps: int, first_step: int) -> None:
        """Not a number."""

    def on_step(self, report: StepReport) -> None:
        """Steps are not kept; their epoch is."""

    def on_epoch(self, report: EpochReport) -> None:
        """Keep and send it."""
        self.session.append(report)
        self._tracker.log_metrics(report.epoch, session_metrics(report))

    def figure(self) -> Figure:
        """Loss and validation accuracy by epoch, of both phases."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for name, values in self._series(loss=True).items():
            loss.plot(range(1, len(values) + 1), values, marker=".", label=name)
        for name, values in self._series(loss=False).items():
            accuracy.plot(range(1, len(values) + 1), values, marker=".", label=name)
        loss.set(xlabel="epoch", ylabel="mean training loss", title="Loss")
        accuracy.set(xlabel="epoch", ylabel="validation accuracy", title="Accuracy", ylim=(0, 1.02))
        for axes in (loss, accuracy):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        return figure

    def _series(self, *, loss: bool) -> Mapping[str, list[float]]:
        series: dict[str, list[float]] = {}
        for epoch in self.encoder:
            for task, value in epoch.losses.items():
                series.setdefault(f"{task} (phase 1)", []).append(
                    value if loss else epoch.metrics[task].get("accuracy", math.nan)
                )
        for report in self.session:
            for task, value in report.losses.items():
                metrics = report.validation[task].metrics
                series.setdefault(task, []).append(value if loss else metrics.get("accuracy", math.nan))
        return series


def encoder_metrics(epoch: EncoderEpoch) -> dict[str, float]:
    """Phase 1's numbers by the names that the tracker shows."""
    values = {f"encoder/{task}/loss": loss for task, loss in epoch.losses.items()}
    for task, metrics in epoch.metrics.items():
        values |= {f"encoder/{task}/validation_{name}": value for name, value in metrics.items()}
    return values | {"encoder/epsilon_spent": epoch.epsilon_spent}


def session_metrics(report: EpochReport) -> dict[str, float]:
    """Phase 2's numbers by the names that the tracker shows."""
    values = {f"{task}/loss": loss for task, loss in report.losses.items()}
    for task, evaluation in report.validation.items():
        values |= {f"{task}/validation_{name}": value for name, value in evaluation.metrics.items()}
    values |= {f"similarity/{pair.replace('|', '-')}": value for pair, value in report.dissimilarity_by_pair.items()}
    return values | {"dissimilarity": report.dissimilarity, "epsilon_spent": report.epsilon_spent}
