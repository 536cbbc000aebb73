#!/usr/bin/env python3
"""Measure what each task's tenant can learn from its features that it did not buy. See ``--help``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from orchestrator.runs.evaluate import Outcome
    from orchestrator.settings.evaluate import EvaluateSettings
    from pipelines.running import Running


def run(settings: EvaluateSettings) -> None:
    """Attack, print the tables, write the report, and say where everything is."""
    from orchestrator.config import flatten
    from orchestrator.evaluation.document import tables_of
    from orchestrator.report.sheet import terminal
    from orchestrator.runs.evaluate import evaluate
    from pipelines.running import published_catalog, running

    catalog = published_catalog(settings.runtime, settings.data)
    with running(
        settings.runtime,
        catalog=catalog,
        run_name=f"evaluate encoder {settings.encoder_version}",
        params=flatten(settings),
        tags={"command": "evaluate", "catalog": catalog},
    ) as work:
        outcome = evaluate(
            settings,
            catalog=work.catalog,
            observer=work.observer,
            progress=work.terminal.on_attack,
            command=_command(),
        )
        for sheet in tables_of(outcome.evaluation):
            work.console.print(terminal(sheet), "")
        out = settings.out or settings.runtime.storage_path / "evaluations" / work.tracker.run_id
        write(outcome, out, work)
        for name, file in (("Report", "report.html"), ("Numbers", "evaluation.json"), ("Tables", "tables.md")):
            work.console.print(f"{name:<8} {out / file}")
        work.console.print(f"MLflow   {settings.runtime.tracking}  (run {work.tracker.run_id})")


def write(outcome: Outcome, out: Path, work: Running) -> None:
    """Report, tables, numbers and figures into ``out``, and into the tracker."""
    from orchestrator.checkpoint import write_atomically
    from orchestrator.evaluation.comparison import FILE
    from orchestrator.evaluation.document import page_of, tables_of
    from orchestrator.evaluation.figures.gallery import draw
    from orchestrator.report.page import render
    from orchestrator.report.sheet import markdown

    evaluation = outcome.evaluation
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(evaluation, outcome.published.features, outcome.points, outcome.examples)
    files = {
        FILE: json.dumps(evaluation.to_json(), indent=2) + "\n",
        "tables.md": "\n".join(markdown(sheet) for sheet in tables_of(evaluation)),
        "report.html": render(page_of(evaluation, drawn.pictures)),
    }
    for name, text in files.items():
        write_atomically(out / name, text.encode())
        work.tracker.log_file(out / name)
    for path in drawn.save(out / "figures"):
        work.tracker.log_file(path, "figures")
    if outcome.own_examples is not None:
        outcome.own_examples.save(out)
    work.tracker.set_tags({"encoder_version": evaluation.subject.encoder.version})


def _command() -> str:
    """As it can be typed again."""
    return shlex.join(["python", "pipelines/evaluate.py", *sys.argv[1:]])


if __name__ == "__main__":
    main("orchestrator.settings.evaluate:EvaluateSettings", run, prog="evaluate.py")
