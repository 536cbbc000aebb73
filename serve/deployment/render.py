"""What is served, as files that other tools deploy: a Ray Serve config, and a KubeRay RayService manifest.

serve deploy serve.yaml                         a running Ray cluster
kubectl apply -f rayservice.yaml                a cluster of Kubernetes with the KubeRay operator
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from serve.arguments import encoder_app_name, route_of, task_app_name
from serve.deployment.environment import Entrance
from serve.deployment.operations import FRONT, encoders_of
from serve.deployment.state import Deployed, Deployments
from serve.front import FrontArgs

_STORAGE: Final = "/storage"
"""Where the storage folder is in a container."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """Of the head, where everything runs: streams and tenants are files of one node."""

    image: str
    storage_claim: str
    cpus: int
    memory: str


def serve_config(deployments: Deployments, entrance: Entrance) -> dict[str, Any]:
    """As `serve deploy` takes it. Every app of a file is removed that a later file does not have."""
    tasks = list(deployments.tasks.values())
    encoders = {encoder_app_name(e.source.catalog, e.encoder_version): e for one in tasks for e in encoders_of(one)}
    registries = sorted({one.args.registry for one in tasks})[:1]
    apps = [
        *(_app(name, None, "serve.app:encoder_app", encoder) for name, encoder in sorted(encoders.items())),
        *(_app(task_app_name(one.task), route_of(one.task), "serve.app:task_app", one.args) for one in tasks),
        *(_app(FRONT, "/", "serve.front_app:front_app", _front(registry, tasks, entrance)) for registry in registries),
    ]
    return {
        "proxy_location": "HeadOnly",
        "http_options": entrance.http_options(),
        "applications": apps,
    }


def rayservice(
    config: Mapping[str, Any], pod: Pod, environment: Mapping[str, str], *, storage: str, ray_version: str
) -> dict[str, Any]:
    """A RayService with one head pod. Paths below ``storage`` become paths of the volume."""
    container = {
        "name": "ray-head",
        "image": pod.image,
        "env": [{"name": name, "value": value} for name, value in sorted(environment.items())],
        "ports": [
            {"containerPort": 6379, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
            {"containerPort": config["http_options"]["port"], "name": "serve"},
        ],
        "resources": {kind: {"cpu": pod.cpus, "memory": pod.memory} for kind in ("requests", "limits")},
        "volumeMounts": [{"name": "storage", "mountPath": _STORAGE}],
    }
    text = yaml.safe_dump(_relocated({**config, "http_options": {**config["http_options"], "host": _ANY}}, storage))
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "metamorphosis"},
        "spec": {
            "serveConfigV2": text,
            "rayClusterConfig": {
                "rayVersion": ray_version,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": str(pod.cpus), "dashboard-host": "0.0.0.0"},  # noqa: S104
                    "template": {
                        "spec": {
                            "containers": [container],
                            "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": pod.storage_claim}}],
                        }
                    },
                },
            },
        },
    }


def as_yaml(document: Mapping[str, Any]) -> str:
    """In the order in which it was written."""
    return str(yaml.safe_dump(dict(document), sort_keys=False, width=120))


_ANY: Final = "0.0.0.0"  # noqa: S104 - of a pod; the Service in front decides who gets there


def _front(registry: str, tasks: Sequence[Deployed], entrance: Entrance) -> FrontArgs:
    folder = str(Path(tasks[0].args.streams).parent)
    return FrontArgs(registry=registry, folder=folder, tls=entrance.certificate is not None)


def _app(name: str, route: str | None, path: str, args: BaseModel) -> dict[str, Any]:
    return {"name": name, "route_prefix": route, "import_path": path, "args": args.model_dump()}


def _relocated(value: Any, storage: str) -> Any:
    """The same, with every path below the storage folder below the volume."""
    match value:
        case str():
            return value.replace(storage, _STORAGE)
        case Mapping():
            return {key: _relocated(inner, storage) for key, inner in value.items()}
        case list() | tuple():
            return [_relocated(inner, storage) for inner in value]
        case _:
            return value
