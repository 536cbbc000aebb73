#!/usr/bin/env python3
"""Add one task to a published encoder, without touching the tasks that are already there. See ``--help``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.command import main

if TYPE_CHECKING:
    from orchestrator.settings.add_task import AddTaskSettings


def run(settings: AddTaskSettings) -> None:
    """Train the task, publish it, and show that nothing else changed."""
    from orchestrator.config import flatten
    from orchestrator.runs.add_task import add_task
    from pipelines.remote import remote_tenants
    from pipelines.running import published_catalog, running
    from pipelines.summary import show_added

    catalog = published_catalog(settings.runtime, settings.data)
    with (
        running(
            settings.runtime,
            catalog=catalog,
            run_name=f"add {settings.task}",
            params=flatten(settings),
            tags={"command": "add_task", "catalog": catalog, "task": settings.task},
        ) as work,
        remote_tenants((settings.task,), settings.remote, settings.runtime, work.observer) as remote,
    ):
        outcome = add_task(
            settings,
            catalog=work.catalog,
            observer=work.observer,
            run_id=work.tracker.run_id,
            tenant=remote.tenants.get(settings.task),
        )
        remote.ended([outcome.task], outcome.session)
        show_added(work, outcome, settings)


if __name__ == "__main__":
    main("orchestrator.settings.add_task:AddTaskSettings", run, prog="add_task.py")
