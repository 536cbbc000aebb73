"""From flags and the catalog to what is to be served. Nothing here touches Serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.catalog import Catalog, catalogs
from orchestrator.errors import ConfigError, NotPublishedError
from orchestrator.mlflow_store import check_reachable
from orchestrator.settings.shared import RuntimeSettings
from serve.arguments import CatalogArgs, TaskArgs, VersionArgs
from serve.deployment.environment import Entrance, haproxy_binary
from serve.deployment.state import Deployed, Deployments
from serve.leakage import newest_evaluation
from serve.model import check_may_be_served
from serve.settings import DeployUp, EntranceSettings, Place, SourceSettings
from serve.tenants.gate import Places
from serve.tenants.tls import self_signed
from serve.versions import served_version

Say = Callable[[str], None]


def catalog_of(settings: Place, source: SourceSettings) -> Catalog:
    """The one that is named, or the only one there is."""
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


def registry_of(settings: Place, source: SourceSettings) -> Path:
    """The file of tenants."""
    return (source.registry or Places.in_storage(settings.storage_path).registry).expanduser().absolute()


def wanted_tasks(settings: DeployUp, catalog: Catalog, deployments: Deployments, say: Say) -> dict[str, Deployed]:
    """What `up` asks for and is not served yet. Raises `NotPublishedError`, `PrivacyRefusal`, `ConfigError`."""
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


def entrance_of(settings: EntranceSettings, folder: Path, *, there: Entrance | None) -> Entrance:
    """Of the flags; what they do not say is as it is, or the default. Raises `ConfigError` where they say otherwise."""
    base = there or Entrance(haproxy=False)
    certificate, key = base.certificate, base.key
    if settings.tls == "off":
        certificate = key = None
    elif settings.tls == "files":
        certificate, key = (str(path.expanduser().absolute()) for path in (settings.certificate, settings.key) if path)
    elif settings.tls == "self-signed" and certificate is None:
        made = self_signed(folder / "tls", [settings.host or base.host, "localhost", "127.0.0.1"])
        certificate, key = (str(path) for path in made)
    haproxy = settings.haproxy == "on"
    if settings.haproxy == "auto":
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
        registry=str(registry_of(settings, settings.source)),
        streams=str(settings.folder / "streams"),
        current=version,
        shared_encoder=endpoint.shared_encoder,
        replicas=endpoint.replicas(),
        max_body_bytes=int(endpoint.max_body_mb * (1 << 20)),
        max_pixels=endpoint.max_pixels,
        stream_age_s=endpoint.keep_hours * 3600,
        stream_bytes=int(endpoint.keep_mb * (1 << 20)),
    )
