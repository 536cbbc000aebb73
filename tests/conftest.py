"""Fixtures for all tests: a tiny session, and one Ray cluster for the whole run."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import BOUNDED_NETWORK, TINY_NETWORK, tiny_training_data

from orchestrator.assembly import SessionConfig, SessionPlan
from orchestrator.privacy.bounded.keyed_noise import NoiseKey
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.release import NoisePlan


@pytest.fixture
def tiny_plan(tmp_path: Path) -> SessionPlan:
    """A session on a frozen, random encoder: two tasks, two epochs."""
    return SessionPlan(
        data=tiny_training_data(),
        network=TINY_NETWORK,
        config=SessionConfig(epochs=2, batch_size=16, lr=1e-2),
        dissimilarity=DissimilarityConfig(omega=0.1),
        seed=0,
        encoder=TINY_NETWORK.build_encoder(seed=0).state_dict(),
        cache_root=tmp_path / "features",
        device="cpu",
        threads=1,
    )


@pytest.fixture
def key_path(tmp_path: Path) -> Path:
    """The file of a noise key that is the same in every test."""
    path = tmp_path / "keys" / "tiny.key"
    NoiseKey(bytes(range(32))).save(path)
    return path


@pytest.fixture
def bounded_plan(tiny_plan: SessionPlan, key_path: Path) -> SessionPlan:
    """As `tiny_plan`, with bounded features and no dissimilarity."""
    return dataclasses.replace(
        tiny_plan,
        network=BOUNDED_NETWORK,
        dissimilarity=DissimilarityConfig(omega=0.0),
        noise=NoisePlan(key=key_path, run="a"),
    )


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow file with its tables, to be copied: making them takes MLflow seconds."""
    from orchestrator.mlflow_store import open_client

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def shop_template(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """A storage folder with small published tasks of digits (`served.train_shop`). Copy it, or only read."""
    from served import train_shop

    home = tmp_path_factory.mktemp("shop")
    shutil.copy(mlflow_template, home / "mlflow.db")
    train_shop(home)
    return home


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for the whole test session, guarded by a token of its own."""
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        namespace="tests",
    )
    yield
    ray.shutdown()
