#!/usr/bin/env python3
"""Train a private encoder and the tasks behind it, and publish both. See ``--help``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from orchestrator.settings.train import TrainSettings


def run(settings: TrainSettings) -> None:
    """Train, publish, and say where everything is."""
    from orchestrator.config import flatten
    from orchestrator.runs.train import TrainRun
    from pipelines.remote import remote_tenants
    from pipelines.running import catalog_name, running
    from pipelines.summary import show_trained

    catalog = catalog_name(settings.runtime, settings.data.data)
    with (
        running(
            settings.runtime,
            catalog=catalog,
            run_name=f"train {','.join(settings.tasks) or 'encoder'}",
            params=flatten(settings),
            tags={"command": "train", "catalog": catalog, "algorithm": settings.algorithm},
        ) as work,
        remote_tenants(settings.elsewhere, settings.remote, settings.runtime, work.observer) as remote,
    ):
        outcome = TrainRun(
            settings, catalog=work.catalog, tracker=work.tracker, observer=work.observer, tenants=remote.tenants
        ).run()
        remote.ended(outcome.tasks, outcome.session)
        show_trained(work, outcome, settings)


if __name__ == "__main__":
    main("orchestrator.settings.train:TrainSettings", run, prog="train.py", presets=True)
