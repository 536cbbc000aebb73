"""What a command says at its end: what was published, what is promised, where everything is; and so does MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from orchestrator.catalog_records import TaskRecord
from orchestrator.privacy.guarantee import Guarantee
from orchestrator.runs.add_task import AddOutcome
from orchestrator.runs.train import TrainOutcome
from orchestrator.settings.add_task import AddTaskSettings
from orchestrator.settings.shared import RuntimeSettings
from orchestrator.settings.train import TrainSettings
from pipelines.running import Running


def show_trained(work: Running, outcome: TrainOutcome, settings: TrainSettings) -> None:
    """The end of train.py."""
    version = outcome.encoder.version
    work.console.print(f"\n[bold]Published[/bold] encoder {version} of catalog {work.catalog.name!r}")
    _track(work, outcome.guarantee, outcome.tasks, encoder_version=version)
    _show_tasks(work, outcome.tasks)
    _show_guarantee(work, outcome.guarantee)
    _show_places(work, settings.runtime)


def show_added(work: Running, outcome: AddOutcome, settings: AddTaskSettings) -> None:
    """The end of add_task.py."""
    work.console.print(
        f"\n[bold]Published[/bold] task {settings.task!r} on encoder {outcome.encoder.version} "
        f"of catalog {work.catalog.name!r}"
    )
    _track(work, outcome.guarantee, [outcome.task], encoder_version=outcome.encoder.version)
    work.tracker.log_json(outcome.unchanged, "unchanged_artefacts.json")
    _show_tasks(work, [outcome.task])
    work.console.print(
        f"{len(outcome.unchanged)} files of the encoder and the earlier tasks were read again: every byte is as before."
    )
    _show_guarantee(work, outcome.guarantee)
    _show_places(work, settings.runtime)


def _track(work: Running, guarantee: Guarantee, tasks: Iterable[TaskRecord], *, encoder_version: str) -> None:
    tags = {"encoder_version": encoder_version, "guarantee": guarantee.short()}
    for record in tasks:
        tags[f"published.{record.spec.name}"] = record.version
        work.tracker.log_metrics(
            0, {f"{record.spec.name}/test_{name}": value for name, value in record.metrics.items()}
        )
    work.tracker.set_tags(tags)
    work.tracker.log_text(guarantee.statement(), "guarantee.txt")
    work.tracker.log_json(guarantee.to_json(), "guarantee.json")
    epsilon = guarantee.epsilon if guarantee.epsilon is not None else guarantee.nominal_epsilon
    if epsilon is not None:
        work.tracker.log_metrics(0, {"epsilon": epsilon})
    if work.history.encoder or work.history.session:
        work.tracker.log_figure(work.history.figure(), "training.png")


def _show_tasks(work: Running, tasks: Iterable[TaskRecord]) -> None:
    table = Table(title="Measured on the test subset", title_justify="left")
    table.add_column("task")
    table.add_column("who gets its feature")
    names: list[str] = []
    rows: list[tuple[TaskRecord, dict[str, Any]]] = [(record, dict(record.metrics)) for record in tasks]
    if not rows:
        return
    for _, metrics in rows:
        names += [name for name in metrics if name not in names]
    for name in names:
        table.add_column(name, justify="right")
    for record, metrics in rows:
        who = "nobody (private)" if record.private else "its tenant"
        table.add_row(record.spec.name, who, *[f"{metrics.get(name, float('nan')):.3f}" for name in names])
    work.console.print(table)


def _show_guarantee(work: Running, guarantee: Guarantee) -> None:
    work.console.print(f"[bold]What is promised.[/bold] {guarantee.statement()}\n")


def _show_places(work: Running, runtime: RuntimeSettings) -> None:
    work.console.print(f"MLflow   {runtime.tracking}  (run {work.tracker.run_id})")
    work.console.print(f"Storage  {runtime.storage_path}")
    work.console.print("Next     python pipelines/add_task.py TASK, or python pipelines/evaluate.py")
