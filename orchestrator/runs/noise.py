"""The key of bounded features' noise: one file for each storage folder and catalog, which never leaves it.

Two processes that need the first one at once get the same. What was published under a key that is lost cannot be
released again: with another key every feature would be told a second time, with other noise.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.catalog import Catalog
from orchestrator.errors import ConfigError
from orchestrator.models.modules import ModuleConfig
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.bounded.keyed_noise import NoiseKey
from orchestrator.release import NoisePlan


def noise_key_path(storage: Path, catalog: str) -> Path:
    """Where the key of that catalog is, or will be."""
    return storage / "keys" / f"{catalog}.key"


def noise_plan(network: NetworkConfig, catalog: Catalog, *, storage: Path, run: str) -> NoisePlan | None:
    """Where the noise of one run comes from, the key made if there was no need of one before; None for other networks.

    Raises `ConfigError` where a key was lost under which features are published.
    """
    if not isinstance(network, BoundedNetworkConfig):
        return None
    path = noise_key_path(storage, catalog.name)
    if not path.exists():
        _check_none_lost(catalog, path)
        try:
            NoiseKey.generate().save(path)
        except ConfigError:
            if not path.exists():  # otherwise another process was faster
                raise
    NoiseKey.load(path)  # damaged, or open to others: said before anything is trained
    return NoisePlan(key=path, run=run)


def _check_none_lost(catalog: Catalog, path: Path) -> None:
    for encoder in catalog.encoders():
        for task, record in catalog.tasks(encoder.version).items():
            if ModuleConfig.from_json(dict(record.module_config)).channel is not None:
                raise ConfigError(
                    f"the noise key {path} is missing, and {task!r} of encoder {encoder.version} was published under "
                    "it: put it back, or begin another catalog with --catalog"
                )
