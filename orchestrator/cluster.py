"""Joining a Ray cluster, or starting one that is gone when the command is."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orchestrator.errors import MissingExtraError, UnavailableError

NAMESPACE = "metamorphosis"


@contextmanager
def ray_cluster(address: str | None, *, worker_env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Connect to ``address``, to ``$RAY_ADDRESS``, or to a new cluster of this machine; disconnect at the end.

    A cluster that was started here is stopped here, and guarded by a token of its own: without one Ray would write a
    world-readable token file to the user's home, which then decides how their next cluster behaves. ``worker_env`` is
    what is to stand in the environment of processes that are started on a cluster at an address; no secrets.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("cluster", "ray") from error
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
        return
    handlers = _signal_handlers()
    try:
        if address:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": dict(worker_env)} if worker_env else None,
            )
        else:
            _start_local()
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or "a new local cluster"
        raise UnavailableError(
            f"cannot reach the Ray cluster at {where}: {str(error).splitlines()[0]}. Check --address, that `ray start` "
            "is running there, and that RAY_AUTH_MODE and the token agree with the cluster's"
        ) from error
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _signal_handlers() -> dict[int, Any]:
    """The process's own: Ray puts one in their place that aborts with a core dump on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _start_local() -> None:
    import ray

    # Ray guards a local cluster with a token by itself where RAY_AUTH_MODE is unset; with this one it writes no file.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def cluster_cpus() -> float:
    """CPUs of the whole cluster, at least 1."""
    return max(1.0, _resources().get("CPU", 1.0))


def use_gpu(device: str) -> bool:
    """Whether a party on this device should be given a GPU of the cluster."""
    return device != "cpu" and _resources().get("GPU", 0.0) > 0


def free_cpus() -> float:
    """CPUs that nobody has reserved."""
    import ray

    resources: dict[str, float] = ray.available_resources()
    return resources.get("CPU", 0.0)


def _resources() -> dict[str, float]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()
    return resources
