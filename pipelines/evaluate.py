#!/usr/bin/env python3
"""Measure what each task's tenant can learn from its features that it did not buy. See ``--help``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from orchestrator.evaluation.collect import Published
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
    from orchestrator.evaluation.parallel import on_ray
    from orchestrator.evaluation.tables import leakage_markdown, leakage_table

    published = collect(
        work.catalog,
        work.observer,
        encoder_version=settings.encoder_version,
        data=settings.data,
        targets=settings.targets,
        storage=settings.runtime.storage_path,
        threads=settings.runtime.threads,
    )
    alone = _train_alone(settings, published, work) if settings.alone else {}
    work.observer.on_stage("attacking")
    report = evaluate_leakage(
        published.features,
        published.labels,
        published.specs,
        budget=AttackBudget.preset(settings.budget, seeds=settings.seeds),
        seed=settings.seed,
        run=on_ray if settings.runtime.engine == "ray" else map,
        progress=work.terminal.on_attack,
    )
    work.console.print(leakage_table(report, alone=alone))
    out = settings.out or settings.runtime.storage_path / "evaluations" / work.tracker.run_id
    _write(out, report.to_json(), leakage_markdown(report, alone=alone))
    figure = leakage_heatmap(report)
    save_figure(figure, out / "leakage.png")
    work.tracker.log_figure(figure, "leakage.png")
    work.tracker.log_json(report.to_json(), "leakage.json")
    work.tracker.set_tags({"encoder_version": published.encoder.version})
    work.console.print(
        f"\nFigure   {out / 'leakage.png'}\nTable    {out / 'leakage.md'}\nNumbers  {out / 'leakage.json'}"
    )
    work.console.print(f"MLflow   {settings.runtime.tracking}  (run {work.tracker.run_id})")


def _train_alone(settings: EvaluateSettings, published: Published, work: Running) -> Mapping[str, float]:
    """Every sold task's network, trained alone and without any privacy: what the features are compared with."""
    from torch import nn

    from orchestrator.baselines.alone import train_alone

    table, splits = published.opened.table, published.opened.splits
    accuracy = {}
    for task, features in published.features.items():
        if features.private:
            continue
        work.observer.on_stage(f"training {task} alone, without privacy")
        spec, network, size = features.spec, published.network, published.encoder.image_size
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
            epochs=settings.alone,
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
