"""The settings of the commands that serve: what flags fill in. A field's docstring is its ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestrator.errors import ConfigError
from orchestrator.settings.shared import RuntimeSettings
from serve.arguments import ReplicaArgs
from serve.model import MAX_PIXELS, Arithmetic

_INLINE = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where it is served from."""

    storage: Path | None = None
    """The storage folder of the commands that train. Default: $METAMORPHOSIS_HOME, or ~/metamorphosis."""
    address: str | None = None
    """Ray cluster to serve on, as host:port or auto. Default: $RAY_ADDRESS, or a head node of this storage folder alone
    on this machine, which `up` starts and which stays."""
    timeout_s: float = 180.0
    """Seconds for Serve to do what is asked. After that it is taken back, and the command says what Serve said."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be > 0, got {self.timeout_s}")

    @property
    def storage_path(self) -> Path:
        """Absolute."""
        return RuntimeSettings(storage=self.storage).storage_path

    @property
    def folder(self) -> Path:
        """Of what serving keeps: what is served, on which cluster, and the streams."""
        return self.storage_path / "serving"


@dataclass(frozen=True, kw_only=True, slots=True)
class EntranceSettings:
    """Where clients come in. It stays as it is until `down --all`, so later commands need not say it again."""

    host: str | None = None
    """Interface to listen on; 0.0.0.0 is all of them. Default: 127.0.0.1."""
    port: int | None = None
    """Port to listen on. Default: 8000."""
    haproxy: Literal["auto", "on", "off"] = "auto"
    """Ray's HAProxy in front, several times as fast as Serve's own proxy; it speaks no TLS. auto: where it is installed
    and there is no certificate."""
    tls: Literal["off", "self-signed", "files"] | None = None
    """files: --certificate and --key; self-signed: made in the storage folder, for trying out, or for devices that are
    given the certificate. Default: off."""
    certificate: Path | None = None
    """PEM file of the certificate, with those that signed it."""
    key: Path | None = None
    """PEM file of its private key."""
    metrics_port: int = 9464
    """Port on which Ray exports metrics for Prometheus, where this command starts Ray."""

    def __post_init__(self) -> None:
        files = (self.certificate is not None, self.key is not None)
        if any(files) != (self.tls == "files") or (not all(files) and any(files)):
            raise ConfigError("--tls files goes with --certificate and --key: give all three, or none")
        if self.haproxy == "on" and self.tls not in {None, "off"}:
            raise ConfigError("Serve's HAProxy speaks no TLS: leave --haproxy or --tls out")
        for name in ("port", "metrics_port"):
            if not 0 < (getattr(self, name) or 1) < 2**16:
                raise ConfigError(f"{name} must be between 1 and 65535, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSettings:
    """What a task's replicas are."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU where the replica has one (--num-gpus)."""
    arithmetic: Arithmetic = "fp32"
    """half: float16 on a GPU, bfloat16 on a CPU. Features then differ in the third digit."""
    threads: int = 1
    """PyTorch threads of each replica."""
    num_cpus: float = 0.2
    """Share of a CPU that Ray reserves for each replica. It does not limit it."""
    num_gpus: float = 0.0
    """Share of a GPU of each replica."""
    min_replicas: int = 1
    """Replicas of each task."""
    max_replicas: int = 1
    """With more than that, Serve adds and removes replicas with the load."""
    max_batch: int = 16
    """Images computed at once."""
    max_ongoing: int = 64
    """Requests at once in a replica. More wait, with HAProxy for 15 s, and then get 503."""
    max_body_mb: float = 8.0
    """Of an encoded image."""
    max_pixels: int = MAX_PIXELS
    """Of an image."""
    keep_hours: float = 24.0
    """For which a feature stays in the task's stream."""
    keep_mb: float = 1024.0
    """Of features that stay in it."""
    shared_encoder: bool = False
    """Run the encoder once for all tasks, in an app of its own: for GPUs. On CPUs the hop costs more than it saves."""

    def __post_init__(self) -> None:
        for name in ("threads", "min_replicas", "max_replicas", "max_batch", "max_ongoing", "max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_body_mb", "keep_hours", "keep_mb"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.num_cpus < 0 or self.num_gpus < 0:
            raise ConfigError("shares of CPUs and GPUs must be >= 0")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")

    def replicas(self) -> ReplicaArgs:
        """For Serve."""
        return ReplicaArgs(
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            max_batch=self.max_batch,
            max_ongoing=self.max_ongoing,
            max_queued=2 * self.max_ongoing,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSettings:
    """Which published tasks."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tasks, as A,B,C. Default: every published task of the encoder that is not private."""
    catalog: str | None = None
    """Catalog of the tasks. Default: the only one there is."""
    tracking_uri: str | None = None
    """MLflow tracking and registry. Default: $MLFLOW_TRACKING_URI, or a SQLite file in the storage folder."""
    encoder_version: str = "latest"
    """Which published encoder."""
    evaluation: Path | None = None
    """The evaluation.json whose leakage the metadata tells. Default: the encoder's newest in the storage folder."""
    registry: Path | None = None
    """The file of tenants. Default: tenants/registry.db in the storage folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployUp(Place):
    """Serve published tasks, each at /tasks/NAME. Tasks that are served already stay as they are."""

    source: Annotated[SourceSettings, _INLINE] = SourceSettings()
    entrance: Annotated[EntranceSettings, _INLINE] = EntranceSettings()
    endpoint: Annotated[EndpointSettings, _INLINE] = EndpointSettings()
    pictures: bool = False
    """Let the operator's page draw pictures of data sets that may show people. It stays as it is until `down --all`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployUpdate(Place):
    """Serve another version of one task: of all images, or of a share of them, to try it out."""

    task: Annotated[str, tyro.conf.Positional]
    """The task."""
    encoder_version: str = "latest"
    """The encoder whose version of the task it is to be."""
    share: float | None = None
    """Share of images for the new version, above 0 and below 1, beside the one that is served now. The same image
    always goes the same way. Default: all of them."""
    evaluation: Path | None = None
    """The evaluation.json of that encoder. Default: the newest in the storage folder."""

    def __post_init__(self) -> None:
        Place.__post_init__(self)
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(f"share must be above 0 and below 1, got {self.share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployRollback(Place):
    """End the trial of a new version, or go back to the version that was served before."""

    task: Annotated[str, tyro.conf.Positional]
    """The task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployDown(Place):
    """Serve tasks no more. Their streams stay in the storage folder."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tasks, as A,B,C."""
    all: bool = False
    """All of them, and stop Serve, and the head node if `up` started it."""

    def __post_init__(self) -> None:
        Place.__post_init__(self)
        if bool(self.tasks) == self.all:
            raise ConfigError("name tasks to serve no more, as A,B,C, or give --all")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployScale(Place):
    """Give one task another number of replicas."""

    task: Annotated[str, tyro.conf.Positional]
    """The task."""
    min_replicas: int = 1
    """At least so many."""
    max_replicas: int | None = None
    """With more than --min-replicas, Serve adds and removes replicas with the load. Default: --min-replicas."""

    def __post_init__(self) -> None:
        Place.__post_init__(self)
        if self.min_replicas < 1 or (self.max_replicas is not None and self.max_replicas < self.min_replicas):
            raise ConfigError("replicas must be at least 1, and max_replicas at least min_replicas")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployStatus(Place):
    """Print what is served, and how it is."""

    json: bool = False
    """As JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployRender(Place):
    """Write what is served as a Ray Serve config and as a KubeRay RayService manifest."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for serve.yaml and rayservice.yaml."""
    image: str = "metamorphosis-ray:latest"
    """Container image with this project installed, for the manifest."""
    storage_claim: str = "metamorphosis"
    """PersistentVolumeClaim with the storage folder, for the manifest."""
    cpus: int = 4
    """CPUs of the head pod, for the manifest."""
    memory: str = "8Gi"
    """Memory of the head pod, for the manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploySettings:
    """Serve published tasks: one endpoint each, deployed, updated, rolled back and removed alone."""

    command: Annotated[
        Annotated[DeployUp, tyro.conf.subcommand("up")]
        | Annotated[DeployUpdate, tyro.conf.subcommand("update")]
        | Annotated[DeployRollback, tyro.conf.subcommand("rollback")]
        | Annotated[DeployDown, tyro.conf.subcommand("down")]
        | Annotated[DeployScale, tyro.conf.subcommand("scale")]
        | Annotated[DeployStatus, tyro.conf.subcommand("status")]
        | Annotated[DeployRender, tyro.conf.subcommand("render")],
        _INLINE,
    ]
