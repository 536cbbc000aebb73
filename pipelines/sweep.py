#!/usr/bin/env python3
"""Try out omega, epsilon, split index and feature bits, and print which no other choice beats. See ``--help``."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.runs.folder import RunFolder
    from orchestrator.sweep.plan import Plan
    from orchestrator.sweep.recipe import Need
    from orchestrator.sweep.records import Trial
    from orchestrator.sweep.run import SweepOutcome
    from orchestrator.sweep.settings import SweepSettings
    from orchestrator.sweep.tracked import TrackedTrials
    from pipelines.running import Running


def run(settings: SweepSettings) -> None:
    """Plan, run, print the front, and say where everything is."""
    from orchestrator.config import flatten
    from orchestrator.report.sheet import terminal
    from orchestrator.sweep.run import sweep
    from orchestrator.sweep.tables import front_sheet
    from orchestrator.sweep.tracked import TrackedTrials
    from pipelines.running import catalog_name, running

    settings.check()
    runtime = settings.runtime.local
    catalog = settings.runtime.catalog or f"{catalog_name(runtime, settings.data.data)[:56]}-sweep"
    with running(
        runtime,
        catalog=catalog,
        run_name=f"sweep {','.join(d.name for d in settings.searched.swept) or 'seeds'}",
        params=flatten(settings),
        tags={"command": "sweep", "catalog": catalog},
    ) as work:

        def tracked(folder: RunFolder) -> TrackedTrials:
            return TrackedTrials(
                runtime.tracking,
                experiment=f"metamorphosis-{catalog}",
                parent_run_id=work.tracker.run_id,
                folder=folder,
                tags={"command": "sweep trial", "catalog": catalog},
            )

        outcome = sweep(
            settings,
            catalog=work.catalog,
            tracked=tracked,
            run_id=work.tracker.run_id,
            observer=work.observer,
            watcher=_Terminal(work.console),
            command=_command(),
        )
        work.console.print()
        if outcome.result.front:
            work.console.print(terminal(front_sheet(outcome.result)), "")
        _write(outcome, settings, work)
        _close(outcome, work)


class _Terminal:
    """Prints the plan, and a line for every encoder and trial."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_plan(self, plan: Plan) -> None:
        """All of it, before anything runs."""
        from orchestrator.report.sheet import terminal

        self._console.print(terminal(plan.sheet()), "")
        self._console.print(f"[bold]Plan.[/bold] {plan.words}\n")

    def on_encoder(self, need: Need, state: str) -> None:
        """How it stands."""
        told = {"training": "training", "ready": "trained", "found": "found in the catalog", "failed": "FAILED"}
        self._console.print(f"  encoder  {need.words}: {told[state]}")

    def on_trial(self, trial: Trial, *, done: int, total: int, before: bool) -> None:
        """One line."""
        from orchestrator.sweep.objectives import OBJECTIVES

        values = ", ".join(
            f"{name} {OBJECTIVES[name].shown(trial.values[name])}"
            for name in ("utility", "leakage")
            if name in trial.values
        )
        how = "done before" if before else f"reused {', '.join(trial.reused)}" if trial.reused else ""
        told = f"{trial.status.upper()}: {trial.problem}" if trial.status != "done" else values
        self._console.print(f"  trial {done:>3}/{total}  {trial.point.words}: {told}{f'; {how}' if how else ''}")


def _write(outcome: SweepOutcome, settings: SweepSettings, work: Running) -> None:
    """Numbers, tables, figures and the report into a folder, the tracker, and the storage where that is elsewhere."""
    from orchestrator.checkpoint import write_atomically
    from orchestrator.evaluation.figures.drawing import save_figure
    from orchestrator.evaluation.subject import installed_versions
    from orchestrator.report.page import render
    from orchestrator.report.sheet import markdown
    from orchestrator.sweep.document import page_of, tables_of
    from orchestrator.sweep.gallery import draw

    result, out = outcome.result, outcome.folder
    drawn = draw(result)
    files = {
        "sweep.json": (json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n").encode(),
        "sweep.parquet": result.to_parquet(),
        "tables.md": "\n".join(markdown(sheet) for sheet in tables_of(result)).encode(),
    }
    if settings.report:
        files["report.html"] = render(page_of(result, drawn.pictures, versions=installed_versions())).encode()
    for name, data in files.items():
        write_atomically(out / name, data)
        work.tracker.log_file(out / name)
        if settings.runtime.is_remote:
            outcome.store.write(name, data)
    for name, figure in drawn.figures.items():
        for path in save_figure(figure, out / "figures" / f"{name}.png"):
            work.tracker.log_file(path, "figures")
            if settings.runtime.is_remote:
                outcome.store.write(f"figures/{path.name}", path.read_bytes())


def _close(outcome: SweepOutcome, work: Running) -> None:
    from orchestrator.privacy.accounting import rounded_up

    result, out = outcome.result, outcome.folder
    work.console.print(
        f"{len(result.trials)} trials on {result.encoders_trained} encoder(s) trained by this sweep, in "
        f"{result.seconds:.0f} s. Epsilon {rounded_up(result.spent)} is spent on {result.data} in all, at delta "
        f"{result.plan.delta:g}. Whatever is chosen here is chosen by looking at private validation images, which no "
        "epsilon covers."
    )
    if result.failed:
        work.console.print(
            f"[yellow]{len(result.failed)} trial(s) failed; the same command with --resume tries them again.[/yellow]"
        )
    for objective, version in result.registered.items():
        work.console.print(f"Published  encoder {version} of catalog {result.catalog!r} as best-{objective}")
    for name in ("report.html", "sweep.json", "sweep.parquet", "figures"):
        if (out / name).exists():
            work.console.print(f"{name:<14} {out / name}")
    work.console.print(f"{'MLflow':<14} run {work.tracker.run_id}")
    for measure in result.objectives:
        if (best := result.best(measure)) is not None:
            work.tracker.set_tags({f"best.{measure.name}": best.point.words})
            work.tracker.log_metrics(0, {f"best/{measure.name}": best.mean(measure.name)})


def _command() -> str:
    """As it can be typed again."""
    return shlex.join(["python", "pipelines/sweep.py", *sys.argv[1:]])


if __name__ == "__main__":
    main("orchestrator.sweep.settings:SweepSettings", run, prog="sweep.py", presets=True)
