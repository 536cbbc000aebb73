"""Per-tenant counters for Prometheus, on Ray's metrics. Names and numbers: no token, no content."""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

_BOUNDARIES_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]


class RayMeter:
    """`serve.ports.Meter`. Ray adds ``ray_`` to every name, and exports them on each node's metrics port."""

    def __init__(self) -> None:
        who = ("tenant", "task", "verb")
        self._requests = Counter("metamorphosis_requests", "Answered requests.", tag_keys=(*who, "status"))
        self._seconds = Histogram(
            "metamorphosis_request_seconds", "From admission to answer.", boundaries=_BOUNDARIES_S, tag_keys=who
        )
        told = ("tenant", "task", "version")
        self._features = Counter("metamorphosis_released_features", "Features that left.", tag_keys=told)
        self._bytes = Counter("metamorphosis_released_bytes", "Bytes of their bodies.", tag_keys=told)

    def request(self, *, tenant: str, task: str, verb: str, status: int, seconds: float) -> None:
        """See `serve.ports.Meter.request`."""
        tags = {"tenant": tenant, "task": task, "verb": verb}
        self._requests.inc(1.0, {**tags, "status": str(status)})
        self._seconds.observe(seconds, tags)

    def released(self, *, tenant: str, task: str, version: str, features: int, size_bytes: int) -> None:
        """See `serve.ports.Meter.released`."""
        tags = {"tenant": tenant, "task": task, "version": version}
        self._features.inc(float(features), tags)
        self._bytes.inc(float(size_bytes), tags)
