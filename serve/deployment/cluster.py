"""Ray Serve as the commands see it: bring one app, take one away, with a deadline and in words."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orchestrator.cluster import cluster_cpus, ray_cluster
from orchestrator.errors import ConfigError, DeploymentError, UnavailableError
from serve.deployment.environment import (
    Entrance,
    serve_environment,
    write_haproxy_limits,
    write_haproxy_script,
)
from serve.deployment.head import Head, HeadFile
from serve.deployment.statuses import AppStatus, app_statuses

if TYPE_CHECKING:
    from ray.serve import Application

_POLL_S: Final = 0.5
_LONGEST: Final = 600
"""Characters of what Serve says of a failure."""


class Cluster:
    """Serve on one cluster. Made by `joined`."""

    def __init__(self, head: Head, *, scratch: Path, timeout_s: float) -> None:
        self.head, self._scratch, self.timeout_s = head, scratch, timeout_s

    def limit(self, at_once: Mapping[str, int]) -> None:
        """How many requests HAProxy gives a replica of each app at once, from when one of them is next brought."""
        if self.head.entrance.haproxy:
            write_haproxy_limits(self._scratch / "haproxy", at_once)

    def put(self, name: str, app: Application, *, route: str | None) -> None:
        """Bring an app, new or changed, and wait until it is as it is to be; the others stay as they are.

        Raises `DeploymentError` with what Serve said, `ConfigError` if the cluster can never hold it.
        """
        from ray import serve as ray_serve

        with _quiet():
            ray_serve.run_many(
                [ray_serve.RunTarget(target=app, name=name, route_prefix=route)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        self._wait(name)

    def ensure(self, name: str, app: Callable[[], Application], *, route: str | None) -> None:
        """Bring an app that is not there yet, and wait for it either way."""
        if name in self.status():
            self._wait(name)
        else:
            self.put(name, app(), route=route)

    def remove(self, name: str) -> None:
        """Take an app away, after what it is answering."""
        from ray import serve as ray_serve

        with _quiet():
            ray_serve.delete(name, _blocking=False)
        deadline = time.monotonic() + self.timeout_s
        while name in self.status():
            if time.monotonic() > deadline:
                raise DeploymentError(f"{name} is still there after {self.timeout_s:g} s: see deploy.py status")
            time.sleep(_POLL_S)

    def status(self) -> dict[str, AppStatus]:
        """Every app by name."""
        return app_statuses()

    def handle(self, name: str, deployment: str) -> Any:
        """Of a deployment, for its methods that have no route."""
        from ray import serve as ray_serve

        return ray_serve.get_deployment_handle(deployment, app_name=name)

    def check_room(self, cpus: float) -> None:
        """Raise `ConfigError` where all of the cluster's CPUs do not hold so many: Serve would wait for ever."""
        if cpus > (there := cluster_cpus()):
            raise ConfigError(
                f"what is to be served reserves {cpus:g} CPUs, and the cluster has {there:g}: lower --num-cpus or the "
                "number of replicas, or serve fewer tasks"
            )

    def shutdown(self) -> None:
        """End Serve with all its apps."""
        from ray import serve as ray_serve

        with _quiet():
            ray_serve.shutdown()

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            app = self.status().get(name)
            if app is not None and app.state == "RUNNING":
                return
            if app is not None and app.state in {"DEPLOY_FAILED", "UNHEALTHY"}:
                raise DeploymentError(f"{name} could not be served: {_shortened(app.message)}")
            if time.monotonic() > deadline:
                told = "Serve says nothing of it" if app is None else _shortened(app.message) or _waiting(app)
                raise DeploymentError(f"{name} was not ready within {self.timeout_s:g} s: {told}")
            time.sleep(_POLL_S)


@contextmanager
def joined(
    folder: Path, address: str | None, *, begin: Entrance | None, metrics_port: int = 0, timeout_s: float
) -> Iterator[Cluster]:
    """Connect to the cluster on which the tasks of this folder are served, with Serve running on it.

    Where there is none, ``begin`` is how Serve is to listen on one that is started, or on the one at ``address``; None:
    only one that is remembered will do. Raises `UnavailableError`, `ConfigError`.
    """
    file = HeadFile(folder)
    head = file.read()
    if head is not None and address is not None and address != head.address:
        raise ConfigError(f"the tasks are served on {head.address}: leave --address out, or `down --all` first")
    entrance = begin if head is None else head.entrance
    if entrance is None:
        raise UnavailableError("nothing is served from this storage folder: `deploy.py up` serves published tasks")
    environment = serve_environment(entrance, file.scratch / "haproxy")
    if entrance.haproxy:
        write_haproxy_script(file.scratch / "haproxy")
    address = address or os.environ.get("RAY_ADDRESS")
    if head is None and address is not None:
        head = Head(address=address, entrance=entrance)
        file.write(head)
    if head is None or head.pid is not None:
        environment |= file.authentication()
    os.environ.update(environment)
    if head is None:
        check_ports(entrance)
        head = file.start(entrance, environment, metrics_port=metrics_port, timeout_s=timeout_s)
    # The processes of a head that was started here have this environment from it.
    with ray_cluster(head.address, worker_env=environment if head.pid is None else None):
        _start(entrance)
        yield Cluster(head, scratch=file.scratch, timeout_s=timeout_s)


def check_ports(entrance: Entrance) -> None:
    """Raise `UnavailableError` where something listens already where Serve is to: it would try for a minute."""
    ports = {"--port": entrance.port}
    if entrance.haproxy:
        for name, usual in (("RAY_SERVE_HAPROXY_STATS_PORT", 8404), ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101)):
            ports[f"${name}, or --haproxy off"] = int(os.environ.get(name, usual))
    for how, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((entrance.host if port == entrance.port else "127.0.0.1", port))
            except OSError as error:
                raise UnavailableError(
                    f"port {port} cannot be listened at ({error.strerror}): choose another one with {how}"
                ) from error


def remembered(folder: Path) -> Head | None:
    """The cluster on which the tasks of this folder are served, if there is one."""
    return HeadFile(folder).read()


def leave(folder: Path, head: Head) -> None:
    """Stop the head node if it was started here, and forget the cluster. Call it after the connection is closed."""
    HeadFile(folder).stop(head)


def _start(entrance: Entrance) -> None:
    """Serve, if it does not run yet."""
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    try:
        with _quiet():
            ray_serve.start(proxy_location="HeadOnly", http_options=entrance.http_options())
    except (RayError, TimeoutError) as error:
        raise UnavailableError(
            f"Serve does not listen at {entrance.url}: {_shortened(str(error))}. Is the port free? `down --all` takes "
            "back what was started"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Serve's own progress: the commands have theirs."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _shortened(message: str) -> str:
    """The last lines: that is where the cause is."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[-3:])[-_LONGEST:]


def _waiting(app: AppStatus) -> str:
    states = ", ".join(f"{n} {state.lower()}" for state, n in app.replicas.items()) or "none"
    return f"its replicas: {states}. Is there room for it on the cluster? See deploy.py status, and Ray's logs"
