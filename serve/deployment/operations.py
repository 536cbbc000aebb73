"""What `pipelines/deploy.py` does: one task at a time, Serve first, and what is on disk after it.

An app that does not come up is brought back to what it was, so the file always says what Serve was brought to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orchestrator.catalog import Catalog
from orchestrator.errors import DeploymentError, UnavailableError
from serve.arguments import (
    EncoderArgs,
    TaskArgs,
    encoder_app_name,
    route_of,
    task_app_name,
)
from serve.deployment.cluster import Cluster, joined, leave, remembered
from serve.deployment.head import Head
from serve.deployment.planning import Say, catalog_of, entrance_of, registry_of, version_of, wanted_tasks
from serve.deployment.state import Deployed, Deployments, DeploymentsFile
from serve.front import FrontArgs
from serve.settings import (
    DeployDown,
    DeployRollback,
    DeployScale,
    DeployUp,
    DeployUpdate,
    EntranceSettings,
    Place,
)

FRONT = "front"


def up(settings: DeployUp, say: Say) -> None:
    """Serve tasks that are not served yet."""
    catalog = catalog_of(settings, settings.source)
    with _changing(settings) as (file, deployments):
        wanted = wanted_tasks(settings, catalog, deployments, say)
        with _cluster(settings, settings.entrance) as cluster:
            everything = {**deployments.tasks, **wanted}
            cluster.check_room(sum(_cpus(one.args) for one in everything.values()))
            cluster.limit({task_app_name(task): one.args.replicas.max_ongoing for task, one in everything.items()})
            tls = cluster.head.entrance.certificate is not None
            cluster.ensure(FRONT, lambda: _front_app(settings, tls=tls), route="/")
            for task, one in everything.items():
                if task in wanted or task_app_name(task) not in cluster.status():
                    _bring(cluster, one, before=None)
                    deployments.tasks[task] = one
                    file.write(deployments)
                    say(f"{task}  version {one.args.current.version}  {cluster.head.entrance.url}/tasks/{task}")


def update(settings: DeployUpdate, say: Say) -> None:
    """Another version of one task."""
    with _changing(settings) as (file, deployments):
        before = deployments.one(settings.task)
        source = before.args.source
        catalog = Catalog(source.tracking_uri, source.catalog)
        evaluation = None if settings.evaluation is None else settings.evaluation.expanduser().absolute()
        version = version_of(catalog, settings.encoder_version, settings.task, settings.storage_path, evaluation)
        after = before.updated(version, settings.share)
        _change(settings, file, deployments, before, after)
        how = "all images" if settings.share is None else f"{settings.share:.0%} of images"
        say(f"{settings.task}  version {version.version}  {how}")


def rollback(settings: DeployRollback, say: Say) -> None:
    """Back to the version before, or without the canary."""
    with _changing(settings) as (file, deployments):
        before = deployments.one(settings.task)
        after = before.rolled_back()
        _change(settings, file, deployments, before, after)
        say(f"{settings.task}  version {after.args.current.version}  all images")


def scale(settings: DeployScale, say: Say) -> None:
    """Another number of replicas."""
    with _changing(settings) as (file, deployments):
        before = deployments.one(settings.task)
        after = before.scaled(settings.min_replicas, settings.max_replicas or settings.min_replicas)
        _change(settings, file, deployments, before, after)
        say(f"{settings.task}  {settings.min_replicas} to {after.args.replicas.max_replicas} replicas")


def down(settings: DeployDown, say: Say) -> None:
    """Tasks, or everything."""
    with _changing(settings) as (file, deployments):
        head = remembered(settings.folder)
        tasks = tuple(deployments.tasks) if settings.all else settings.tasks
        for task in tasks:
            deployments.one(task)
        if head is not None and settings.all:
            _end(settings, head, say)
        elif head is not None:
            with joined(settings.folder, settings.address, begin=None, timeout_s=settings.timeout_s) as cluster:
                for task in tasks:
                    cluster.remove(task_app_name(task))
                    say(f"{task}  is served no more")
                kept = [one for task, one in deployments.tasks.items() if task not in tasks]
                _remove_unused_encoders(cluster, [deployments.tasks[task] for task in tasks], kept)
        deployments.tasks = {task: one for task, one in deployments.tasks.items() if task not in tasks}
        file.write(deployments)


def status(settings: Place) -> dict[str, Any]:
    """A JSON-ready dictionary: where it is, and every task with what is to be and what is."""
    deployments = DeploymentsFile(settings.folder / "deployments.json").read()
    head = remembered(settings.folder)
    found: Mapping[str, Any] = {}
    if head is not None:
        with joined(settings.folder, settings.address, begin=None, timeout_s=settings.timeout_s) as cluster:
            found = cluster.status()
    return {
        "url": None if head is None else head.entrance.url,
        "address": None if head is None else head.address,
        "haproxy": None if head is None else head.entrance.haproxy,
        "tasks": {
            task: {
                "catalog": one.args.source.catalog,
                "version": one.args.current.version,
                "canary": None if one.args.canary is None else one.args.canary.version,
                "share": one.args.share,
                "previous": [version.version for version in one.previous],
                "state": found[task_app_name(task)].state if task_app_name(task) in found else "not running",
                "replicas": dict(found[task_app_name(task)].replicas) if task_app_name(task) in found else {},
                "message": found[task_app_name(task)].message if task_app_name(task) in found else "",
            }
            for task, one in sorted(deployments.tasks.items())
        },
    }


# -- inside ------------------------------------------------------------------------------------------------------------


def _end(settings: DeployDown, head: Head, say: Say) -> None:
    """Serve, and the head node if it was started here."""
    try:
        with joined(settings.folder, settings.address, begin=None, timeout_s=settings.timeout_s) as cluster:
            cluster.shutdown()
        say("Serve has ended" + (", and the head node that `up` started" if head.pid is not None else ""))
    except UnavailableError as error:
        say(f"the cluster is given up, as it does not answer: {error}")
    leave(settings.folder, head)


@contextmanager
def _changing(settings: Place) -> Iterator[tuple[DeploymentsFile, Deployments]]:
    file = DeploymentsFile(settings.folder / "deployments.json")
    with file.locked() as deployments:
        yield file, deployments


@contextmanager
def _cluster(settings: Place, entrance: EntranceSettings) -> Iterator[Cluster]:
    """The cluster that there is, if it listens as is asked for, or a new one that does."""
    head = remembered(settings.folder)
    asked = entrance_of(entrance, settings.folder, there=None if head is None else head.entrance)
    with joined(
        settings.folder,
        settings.address,
        begin=asked,
        metrics_port=entrance.metrics_port,
        timeout_s=settings.timeout_s,
    ) as cluster:
        yield cluster


def _change(
    settings: Place, file: DeploymentsFile, deployments: Deployments, before: Deployed, after: Deployed
) -> None:
    with joined(settings.folder, settings.address, begin=None, timeout_s=settings.timeout_s) as cluster:
        others = [one for task, one in deployments.tasks.items() if task != after.task]
        cluster.check_room(sum(_cpus(one.args) for one in [*others, after]))
        _bring(cluster, after, before=before)
        deployments.tasks[after.task] = after
        file.write(deployments)
        _remove_unused_encoders(cluster, [before], [*others, after])


def _bring(cluster: Cluster, one: Deployed, *, before: Deployed | None) -> None:
    """Make Serve serve it; where that fails, serve what was served before, and raise."""
    from serve.app import task_app

    name = task_app_name(one.task)
    try:
        for encoder in encoders_of(one):
            _bring_encoder(cluster, encoder)
        cluster.put(name, task_app(one.args), route=route_of(one.task))
    except DeploymentError as error:
        if before is None:
            cluster.remove(name)
            raise
        cluster.put(name, task_app(before.args), route=route_of(one.task))
        error.add_note(f"version {before.args.current.version} is served as before")
        raise


def _bring_encoder(cluster: Cluster, args: EncoderArgs) -> None:
    from serve.app import encoder_app

    name = encoder_app_name(args.source.catalog, args.encoder_version)
    cluster.ensure(name, lambda: encoder_app(args), route=None)


def _remove_unused_encoders(cluster: Cluster, before: list[Deployed], after: list[Deployed]) -> None:
    def names(several: list[Deployed]) -> set[str]:
        found = [encoder for one in several for encoder in encoders_of(one)]
        return {encoder_app_name(encoder.source.catalog, encoder.encoder_version) for encoder in found}

    for name in sorted(names(before) - names(after)):
        cluster.remove(name)


def encoders_of(one: Deployed) -> list[EncoderArgs]:
    """The shared encoders that it needs."""
    args = one.args
    if not args.shared_encoder:
        return []
    return [
        EncoderArgs(source=args.source, encoder_version=version.encoder_version, replicas=args.replicas)
        for version in args.versions()
    ]


def _front_app(settings: DeployUp, *, tls: bool) -> Any:
    from serve.front_app import front_app

    registry = str(registry_of(settings, settings.source))
    args = FrontArgs(registry=registry, folder=str(settings.folder), tls=tls, pictures=settings.pictures)
    return front_app(args)


def _cpus(args: TaskArgs) -> float:
    return args.replicas.num_cpus * args.replicas.min_replicas
