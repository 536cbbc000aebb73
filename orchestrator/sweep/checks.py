"""What a sweep would only find out after hours is found out before its first trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation.jobs import check_classification
from orchestrator.network import NetworkConfig
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.space import Point
from orchestrator.sweep.store import Store
from tasks.spec import TaskSpec

_DENSE_SIDE = 2
"""A dense task answers for every place of a map; a map of one place has no places to tell apart."""


def check_points(settings: SweepSettings, points: Sequence[Point], specs: Mapping[str, TaskSpec], *, size: int) -> None:
    """Build every configuration on paper. Raises `ConfigError` for one that cannot be trained."""
    for point in dict.fromkeys(points):
        training = settings.training_of(point)
        network = training.task_privacy.network(training.network)
        check_maps(network, specs, size=size)
        for spec in specs.values():
            network.head_config(size, spec.n_outputs)
        if network.module_config(size).channel is not None and (dense := _dense(specs)):
            raise ConfigError(f"--feature-bits is for classification so far, and {', '.join(dense)} is none")


def check_maps(network: NetworkConfig, specs: Mapping[str, TaskSpec], *, size: int) -> None:
    """Raise `ConfigError` where a dense task would get a map without places."""
    channels, height, width = network.shape(size)
    dense = _dense(specs)
    if dense and min(height, width) < _DENSE_SIDE:
        raise ConfigError(
            f"at --split-index {network.split_index} features of {size}x{size} images are {channels}x{height}x{width}, "
            f"and {', '.join(dense)} needs a map of places: choose a smaller split index or larger images"
        )


def check_attackable(settings: SweepSettings, specs: Mapping[str, TaskSpec]) -> None:
    """Raise `DataError` unless leakage can be measured, if it is asked for."""
    if "leakage" not in settings.objectives:
        return
    if not any(target != task for task in settings.tasks for target in specs):
        raise DataError("no attribute to measure leakage on: name one with --private, or a second task with --tasks")
    check_classification(specs.values())


def check_places(store: Store, out: Path | None) -> None:
    """Raise unless results can be written: `UnavailableError` for the storage, `ConfigError` for ``--out``."""
    store.check_writable()
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to --out {out}: {error.strerror or error}") from error


def _dense(specs: Mapping[str, TaskSpec]) -> list[str]:
    return [task for task, spec in specs.items() if spec.head != "classifier"]
