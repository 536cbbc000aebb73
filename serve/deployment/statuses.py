"""How the apps are, as Ray Serve tells it. Loads little: the app at the root asks too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class AppStatus:
    """One app, as Serve tells it."""

    state: str
    """RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING."""
    message: str
    replicas: Mapping[str, int]
    """Replica state to number."""


def app_statuses() -> dict[str, AppStatus]:
    """Every app by name, for whoever is connected to the cluster."""
    from ray import serve as ray_serve

    found = {}
    for name, app in ray_serve.status().applications.items():
        told = [app.message, *(deployment.message for deployment in app.deployments.values())]
        replicas: dict[str, int] = {}
        for deployment in app.deployments.values():
            for state, n in deployment.replica_states.items():
                replicas[str(state)] = replicas.get(str(state), 0) + n
        found[name] = AppStatus(state=app.status.value, message=" ".join(filter(None, told)), replicas=replicas)
    return found
