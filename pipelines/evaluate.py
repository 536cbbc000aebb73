#!/usr/bin/env python3
"""Measure what each task's tenant can learn from its features that it did not buy. See ``--help``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from orchestrator.evaluation.budget import AttackBudget
    from orchestrator.evaluation.collect import Published
    from orchestrator.evaluation.jobs import JobRunner
    from orchestrator.evaluation.report import Ceiling
    from orchestrator.settings import EvaluateSettings
    from pipelines.running import Running

_ALONE_BATCH = 32
"""Half of the default of a session, so that in as many epochs the network to compare with takes twice the steps."""


def run(settings: EvaluateSettings) -> None:
    """Attack, print the table, draw the figure, and say where everything is."""
    from orchestrator.config import flatten
    from pipelines.running import published_catalog, running

    catalog = published_catalog(settings.runtime, settings.data)
    with running(
        settings.runtime,
        catalog=catalog,
        run_name=f"evaluate encoder {settings.encoder_version}",
        params=flatten(settings),
        tags={"command": "evaluate", "catalog": catalog},
    ) as work:
        evaluate(settings, work)


def evaluate(settings: EvaluateSettings, work: Running) -> None:
    """The command's body."""
    from orchestrator.evaluation.budget import AttackBudget
    from orchestrator.evaluation.collect import collect
    from orchestrator.evaluation.figures import leakage_heatmap, save_figure
    from orchestrator.evaluation.leakage import evaluate_leakage
    from orchestrator.evaluation.tables import leakage_markdown, leakage_tables

    published = collect(
        work.catalog,
        work.observer,
        encoder_version=settings.encoder_version,
        data=settings.data,
        targets=settings.targets,
        storage=settings.runtime.storage_path,
        threads=settings.runtime.threads,
    )
    budget = AttackBudget.preset(settings.budget, seeds=settings.seeds)
    sold = [task for task, features in published.features.items() if not features.private]
    alone = _train_alone(sold, settings.alone, settings, published, work) if settings.alone else {}
    work.observer.on_stage("attacking")
    report = evaluate_leakage(
        published.features,
        published.labels,
        published.specs,
        budget=budget,
        seed=settings.seed,
        images=published.images(budget.subsets) if budget.needs_images else None,
        run=_runner(settings),
        progress=work.terminal.on_attack,
    )
    if settings.ceiling:
        report = dataclasses.replace(report, ceilings=_ceilings(budget, settings, published, work))
    for table in leakage_tables(report, alone=alone):
        work.console.print(table, "")
    out = settings.out or settings.runtime.storage_path / "evaluations" / work.tracker.run_id
    _write(out, report.to_json(), leakage_markdown(report, alone=alone))
    figure = leakage_heatmap(report)
    save_figure(figure, out / "leakage.png")
    work.tracker.log_figure(figure, "leakage.png")
    work.tracker.log_json(report.to_json(), "leakage.json")
    work.tracker.set_tags({"encoder_version": published.encoder.version})
    work.console.print(
        f"Figure   {out / 'leakage.png'}\nTable    {out / 'leakage.md'}\nNumbers  {out / 'leakage.json'}"
    )
    work.console.print(f"MLflow   {settings.runtime.tracking}  (run {work.tracker.run_id})")


def _runner(settings: EvaluateSettings) -> JobRunner:
    from orchestrator.evaluation.parallel import on_ray

    return on_ray if settings.runtime.engine == "ray" else map


def _ceilings(
    budget: AttackBudget, settings: EvaluateSettings, published: Published, work: Running
) -> tuple[Ceiling, ...]:
    """For every target, with the attackers of the report."""
    from orchestrator.evaluation.ceiling import measure_ceilings

    on_images = _train_alone(list(published.labels), settings.ceiling, settings, published, work)
    work.observer.on_stage("attacking the universal feature")
    return measure_ceilings(
        published.universal((*budget.subsets, "test")),
        published.labels,
        published.specs,
        budget=budget,
        seed=settings.seed,
        image_accuracy=on_images,
        images=published.images(budget.subsets) if budget.needs_images else None,
        run=_runner(settings),
        progress=work.terminal.on_attack,
    )


def _train_alone(
    tasks: Sequence[str], epochs: int, settings: EvaluateSettings, published: Published, work: Running
) -> Mapping[str, float]:
    """Every task's whole network, trained alone on images and without any privacy: test accuracy by task."""
    from torch import nn

    from orchestrator.baselines.alone import train_alone

    table, splits = published.opened.table, published.opened.splits
    accuracy = {}
    for task in tasks:
        work.observer.on_stage(f"training {task} alone, without privacy")
        spec, network, size = table.spec(task), published.network, published.encoder.image_size
        whole = nn.Sequential(
            network.build_encoder(seed=settings.seed),
            *network.build_modules([task], size, seed=settings.seed).values(),
            *network.build_heads({task: spec.n_outputs}, size, seed=settings.seed).values(),
        )
        result = train_alone(
            table.images,
            table.task_labels(task),
            normalisation=table.normalisation,
            flip=table.flip,
            train_ids=splits.train,
            test_ids=splits.test,
            network=whole,
            spec=spec,
            epochs=epochs,
            batch_size=_ALONE_BATCH,
            learning_rate=1e-3,
            seed=settings.seed,
        )
        accuracy[task] = result.metrics["accuracy"]
    return accuracy


def _write(out: Path, numbers: object, markdown: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "leakage.json").write_text(json.dumps(numbers, indent=2))
    (out / "leakage.md").write_text(markdown)


if __name__ == "__main__":
    main("EvaluateSettings", run, prog="evaluate.py")
