"""What the apps are made from: plain values that Ray Serve carries, in a config file too. Unknown keys are refused."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from serve.model import Arithmetic
from serve.service import ServiceLimits
from serve.streams import RingLimits

ENDPOINT: Final = "Endpoint"
"""Name of every task app's deployment."""
ENCODER: Final = "Encoder"
"""Of every shared encoder's."""


class _Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CatalogArgs(_Args):
    """Where what is served comes from."""

    tracking_uri: str
    catalog: str
    storage: str
    """Folder of the noise key."""
    device: str = "auto"
    arithmetic: Arithmetic = "fp32"
    threads: int = Field(default=1, ge=1)
    """PyTorch threads of a replica."""


class ReplicaArgs(_Args):
    """What Serve is told of a deployment."""

    num_cpus: float = Field(default=0.5, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    max_ongoing: int = Field(default=64, ge=1)
    """Requests at once in a replica, readers who wait included."""
    max_queued: int = Field(default=128, ge=0)
    """Requests that wait for a replica; more are told to come again."""
    max_batch: int = Field(default=16, ge=1)
    batch_wait_s: float = Field(default=0.0, ge=0)
    """For a batch to fill. At 0 a batch is what came while the one before it was computed."""
    pin: str | None = "node:__internal_head__"
    """Resource of the node that holds the files of streams and tenants; None: anywhere."""

    @property
    def scaled(self) -> bool:
        """Whether Serve chooses their number, by the requests that it counts."""
        return self.max_replicas > self.min_replicas

    def options(self) -> dict[str, Any]:
        """For ``Deployment.options``."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.pin is not None:
            actor["resources"] = {self.pin: 0.0001}
        chosen: dict[str, Any] = {
            "ray_actor_options": actor,
            "max_ongoing_requests": self.max_ongoing,
            "max_queued_requests": self.max_queued,
            "backpressure_config": {"status_code": 503, "retry_after_s": 1},
            "health_check_period_s": 5.0,
            "health_check_timeout_s": 30.0,
            "graceful_shutdown_wait_loop_s": 1.0,
            "graceful_shutdown_timeout_s": 35.0,
            "logging_config": {"enable_access_log": False},  # the audit log has every request
        }
        if self.scaled:
            scaling = {"min_replicas": self.min_replicas, "max_replicas": self.max_replicas}
            return {**chosen, "autoscaling_config": {**scaling, "target_ongoing_requests": 4}}
        return {**chosen, "num_replicas": self.min_replicas}


class VersionArgs(_Args):
    """One version of a task."""

    encoder_version: str
    version: str
    """See `serve.versions.served_version`: what is loaded must be that."""
    evaluation: str | None = None
    """An ``evaluation.json`` in which its leakage was measured."""


class TaskArgs(_Args):
    """One task's app."""

    task: str
    source: CatalogArgs
    registry: str
    """File of the tenants' registry."""
    streams: str
    """Folder of streams."""
    current: VersionArgs
    canary: VersionArgs | None = None
    share: float = Field(default=0.0, ge=0, le=1)
    shared_encoder: bool = False
    """Whether E runs in an app of its own, for all tasks of that encoder."""
    replicas: ReplicaArgs = ReplicaArgs()
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    max_pixels: int = Field(default=16_000_000, ge=1)
    stream_age_s: float = Field(default=24 * 3600.0, gt=0)
    stream_bytes: int = Field(default=1 << 30, ge=1)

    def versions(self) -> tuple[VersionArgs, ...]:
        """The current one, and the canary if there is one."""
        return (self.current,) if self.canary is None else (self.current, self.canary)

    def limits(self) -> ServiceLimits:
        """Of one request."""
        return ServiceLimits(
            max_body_bytes=self.max_body_bytes,
            max_pixels=self.max_pixels,
            max_inflight=self.replicas.max_ongoing,
            max_batch=self.replicas.max_batch,
            batch_wait_s=self.replicas.batch_wait_s,
        )

    def ring(self) -> RingLimits:
        """Of the stream."""
        return RingLimits(max_age_s=self.stream_age_s, max_bytes=self.stream_bytes)


class EncoderArgs(_Args):
    """One shared encoder's app."""

    source: CatalogArgs
    encoder_version: str
    replicas: ReplicaArgs = ReplicaArgs()


def task_app_name(task: str) -> str:
    """Of a task's app in Serve."""
    return f"task-{task}"


def encoder_app_name(catalog: str, encoder_version: str) -> str:
    """Of a shared encoder's app in Serve."""
    return f"encoder-{catalog}-{encoder_version}"


def route_of(task: str) -> str:
    """Below which a task answers."""
    return f"/tasks/{task}"
