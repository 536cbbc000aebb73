#!/usr/bin/env python3
"""Serve published tasks: one endpoint each, deployed, updated, rolled back and removed alone. See ``--help``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipelines.command import main, open_console

if TYPE_CHECKING:
    from rich.console import Console

    from serve.settings import DeployRender, DeploySettings

_WIDTH = 160


def run(settings: DeploySettings) -> None:
    """Do what was asked, and say what is so now."""
    from serve.deployment import operations
    from serve.settings import DeployDown, DeployRollback, DeployScale, DeployStatus, DeployUp, DeployUpdate

    command = settings.command
    console = open_console(width=_WIDTH)
    match command:
        case DeployUp():
            operations.up(command, console.print)
        case DeployUpdate():
            operations.update(command, console.print)
        case DeployRollback():
            operations.rollback(command, console.print)
        case DeployScale():
            operations.scale(command, console.print)
        case DeployDown():
            operations.down(command, console.print)
        case DeployStatus():
            _show(console, operations.status(command), as_json=command.json)
        case _:
            _render(console, command)


def _show(console: Console, status: dict[str, Any], *, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        print(json.dumps(status, indent=2))
        return
    if status["url"] is None:
        console.print("Serve does not run")
    else:
        console.print(f"{status['url']}{'  through HAProxy' if status['haproxy'] else ''}  Ray at {status['address']}")
    table = Table("task", "version", "canary", "share", "state", "replicas", "before", "", box=None)
    for task, one in status["tasks"].items():
        replicas = ", ".join(f"{n} {state.lower()}" for state, n in one["replicas"].items())
        share = f"{one['share']:.0%}" if one["canary"] else ""
        before = ", ".join(one["previous"][:3])
        table.add_row(task, one["version"], one["canary"] or "", share, one["state"], replicas, before, one["message"])
    console.print(table)


def _render(console: Console, command: DeployRender) -> None:
    import ray

    from orchestrator.checkpoint import write_atomically
    from orchestrator.errors import NotPublishedError
    from serve.deployment.cluster import remembered
    from serve.deployment.environment import Entrance, serve_environment
    from serve.deployment.render import Pod, as_yaml, rayservice, serve_config
    from serve.deployment.state import DeploymentsFile

    deployments = DeploymentsFile(command.folder / "deployments.json").read()
    if not deployments.tasks:
        raise NotPublishedError("nothing is served from this storage folder: `deploy.py up` serves published tasks")
    head = remembered(command.folder)
    config = serve_config(deployments, Entrance() if head is None else head.entrance)
    pod = Pod(image=command.image, storage_claim=command.storage_claim, cpus=command.cpus, memory=command.memory)
    manifest = rayservice(
        config,
        pod,
        serve_environment(Entrance(), command.folder),
        storage=str(command.storage_path),
        ray_version=ray.__version__,
    )
    command.out.mkdir(parents=True, exist_ok=True)
    for name, document in (("serve.yaml", config), ("rayservice.yaml", manifest)):
        write_atomically(command.out / name, as_yaml(document).encode())
        console.print(f"wrote {command.out / name}")


if __name__ == "__main__":
    main("serve.settings:DeploySettings", run, prog="deploy.py")
