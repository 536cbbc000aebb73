"""What `pipelines/deploy.py` does: one task at a time, Serve first, and what is on disk after it.

An app that does not come up is brought back to what it was, so the file always says what Serve was brought to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.catalog import Catalog, catalogs
from orchestrator.errors import ConfigError, DeploymentError, NotPublishedError
from orchestrator.mlflow_store import check_reachable
from orchestrator.settings import RuntimeSettings
from serve.arguments import CatalogArgs, EncoderArgs, TaskArgs, VersionArgs
from serve.deployment.cluster import Cluster, joined, leave, remembered
from serve.deployment.environment import Entrance, haproxy_binary
from serve.deployment.state import Deployed, Deployments, DeploymentsFile
from serve.leakage import newest_evaluation
from serve.model import check_may_be_served
from serve.settings import (
    DeployDown,
    DeployRollback,
    DeployScale,
    DeployUp,
    DeployUpdate,
    EntranceSettings,
    Place,
    SourceSettings,
)
from serve.versions import served_version

FRONT = "front"
Say = Callable[[str], None]


def up(settings: DeployUp, say: Say) -> None:
    """Serve tasks that are not served yet."""
    catalog = _catalog(settings, settings.source)
    with _changing(settings) as (file, deployments):
        wanted = _wanted(settings, catalog, deployments, say)
        with _cluster(settings, settings.entrance) as cluster:
            everything = {**deployments.tasks, **wanted}
            cluster.check_room(sum(_cpus(one.args) for one in everything.values()))
            cluster.ensure(FRONT, lambda: _front_app(settings, settings.source), route="/")
            for task, one in everything.items():
                if task in wanted or _app_name(task) not in cluster.status():
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
        if head is not None:
            with joined(settings.folder, settings.address, begin=None, timeout_s=settings.timeout_s) as cluster:
                if settings.all:
                    cluster.shutdown()
                else:
                    for task in tasks:
                        cluster.remove(_app_name(task))
                        say(f"{task}  is served no more")
                    kept = [one for task, one in deployments.tasks.items() if task not in tasks]
                    _remove_unused_encoders(cluster, [deployments.tasks[task] for task in tasks], kept)
        deployments.tasks = {task: one for task, one in deployments.tasks.items() if task not in tasks}
        file.write(deployments)
        if settings.all and head is not None:
            leave(settings.folder, head)
            say("Serve has ended" + (", and the head node that `up` started" if head.pid is not None else ""))


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
                "state": found[_app_name(task)].state if _app_name(task) in found else "not running",
                "replicas": dict(found[_app_name(task)].replicas) if _app_name(task) in found else {},
                "message": found[_app_name(task)].message if _app_name(task) in found else "",
            }
            for task, one in sorted(deployments.tasks.items())
        },
    }


def version_of(
    catalog: Catalog, encoder_version: str, task: str, storage: Path, evaluation: Path | None
) -> VersionArgs:
    """Of a published task that may be served. Raises `NotPublishedError`, `PrivacyRefusal`."""
    encoder, _ = catalog.encoder(encoder_version)
    records = catalog.tasks(encoder.version)
    if task not in records:
        known = ", ".join(name for name, record in records.items() if not record.private) or "(none)"
        raise NotPublishedError(f"no task {task!r} is published for encoder {encoder.version}; known: {known}")
    check_may_be_served(encoder, records[task])
    if evaluation is None:
        evaluation = newest_evaluation(storage, catalog=catalog.name, encoder_version=encoder.version)
    return VersionArgs(
        encoder_version=encoder.version,
        version=served_version(records[task]),
        evaluation=None if evaluation is None else str(evaluation),
    )


# -- inside ------------------------------------------------------------------------------------------------------------


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


def entrance_of(settings: EntranceSettings, folder: Path, *, there: Entrance | None) -> Entrance:
    """Of the flags; what they do not say is as it is, or the default. Raises `ConfigError` where they say otherwise."""
    base = there or Entrance(haproxy=False)
    certificate, key = base.certificate, base.key
    if settings.tls == "off":
        certificate = key = None
    elif settings.tls == "files":
        certificate, key = (str(path.expanduser().absolute()) for path in (settings.certificate, settings.key) if path)
    elif settings.tls == "self-signed" and certificate is None:
        made = importlib.import_module("serve.tenants.tls").self_signed(
            folder / "tls", [settings.host or base.host, "localhost", "127.0.0.1"]
        )
        certificate, key = (str(path) for path in made)
    haproxy = settings.haproxy
    if haproxy is None:
        haproxy = there.haproxy if there is not None else certificate is None and haproxy_binary() is not None
    asked = Entrance(
        host=settings.host or base.host,
        port=settings.port or base.port,
        haproxy=haproxy,
        certificate=certificate,
        key=key,
    )
    if there is not None and asked != there:
        raise ConfigError(
            f"Serve listens at {there.url}{' through HAProxy' if there.haproxy else ''} already, and cannot be moved "
            "while it runs: leave these flags out, or `down --all` first"
        )
    return asked


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
    from serve.app import route_of, task_app

    name = _app_name(one.task)
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
    from serve.app import encoder_app, encoder_app_name

    name = encoder_app_name(args.source.catalog, args.encoder_version)
    cluster.ensure(name, lambda: encoder_app(args), route=None)


def _remove_unused_encoders(cluster: Cluster, before: list[Deployed], after: list[Deployed]) -> None:
    from serve.app import encoder_app_name

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


def _wanted(settings: DeployUp, catalog: Catalog, deployments: Deployments, say: Say) -> dict[str, Deployed]:
    """What is asked for and not served yet."""
    source = settings.source
    encoder, _ = catalog.encoder(source.encoder_version)
    published = [task for task, record in catalog.tasks(encoder.version).items() if not record.private]
    asked = source.tasks or tuple(published)
    if not asked:
        raise NotPublishedError(
            f"no task that may be served is published for encoder {encoder.version} of catalog {catalog.name!r}: "
            "train one with pipelines/train.py or pipelines/add_task.py"
        )
    wanted = {}
    for task in asked:
        evaluation = None if source.evaluation is None else source.evaluation.expanduser().absolute()
        version = version_of(catalog, encoder.version, task, settings.storage_path, evaluation)
        there = deployments.tasks.get(task)
        if there is None:
            wanted[task] = Deployed(args=_args(settings, catalog, task, version))
            continue
        if there.args.source.catalog != catalog.name:
            raise ConfigError(
                f"task {task!r} of catalog {there.args.source.catalog!r} is served at /tasks/{task} already: take it "
                f"down first, or choose other tasks"
            )
        say(f"{task}  version {there.args.current.version}  is served already; `deploy.py update {task}` changes that")
    return wanted


def _args(settings: DeployUp, catalog: Catalog, task: str, version: VersionArgs) -> TaskArgs:
    endpoint = settings.endpoint
    return TaskArgs(
        task=task,
        source=CatalogArgs(
            tracking_uri=catalog.uri,
            catalog=catalog.name,
            storage=str(settings.storage_path),
            device=endpoint.device,
            arithmetic=endpoint.arithmetic,
            threads=endpoint.threads,
        ),
        registry=str(_registry(settings, settings.source)),
        streams=str(settings.folder / "streams"),
        current=version,
        shared_encoder=endpoint.shared_encoder,
        replicas=endpoint.replicas(),
        max_body_bytes=int(endpoint.max_body_mb * (1 << 20)),
        max_pixels=endpoint.max_pixels,
        stream_age_s=endpoint.keep_hours * 3600,
        stream_bytes=int(endpoint.keep_mb * (1 << 20)),
    )


def _front_app(settings: Place, source: SourceSettings) -> Any:
    from serve.front_app import FrontArgs, front_app

    return front_app(FrontArgs(registry=str(_registry(settings, source))))


def _registry(settings: Place, source: SourceSettings) -> Path:
    return (source.registry or settings.storage_path / "tenants.db").expanduser().absolute()


def _catalog(settings: Place, source: SourceSettings) -> Catalog:
    runtime = RuntimeSettings(storage=settings.storage, tracking_uri=source.tracking_uri)
    check_reachable(runtime.tracking)
    if source.catalog is not None:
        return Catalog(runtime.tracking, source.catalog)
    known = catalogs(runtime.tracking)
    if len(known) != 1:
        raise NotPublishedError(
            f"there are {len(known)} catalogs at {runtime.tracking} ({', '.join(known) or 'none'}): "
            + ("name one with --catalog" if known else "train an encoder first with pipelines/train.py")
        )
    return Catalog(runtime.tracking, known[0])


def _cpus(args: TaskArgs) -> float:
    return args.replicas.num_cpus * args.replicas.min_replicas


def _app_name(task: str) -> str:
    from serve.app import task_app_name

    return task_app_name(task)
