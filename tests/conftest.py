"""What many tests share: a tiny data set with real structure, and one Ray cluster for the whole session."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.assembly import SessionConfig, SessionPlan, TrainingData
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from tasks.datasets.table import Normalisation
from tasks.spec import TaskSpec

ROOT = Path(__file__).parent.parent
SUBSETS = {"train": 40, "validation": 12, "attacker": 12, "test": 12}


def tiny_training_data(tasks: tuple[str, ...] = ("bright", "left"), *, flip: bool = False) -> TrainingData:
    """76 16x16 images with two independent, easily seen attributes: how bright, and on which side the bar is."""
    rng = np.random.default_rng(0)
    n = sum(SUBSETS.values())
    labels = {"bright": rng.integers(0, 2, n), "left": rng.integers(0, 2, n), "third": rng.integers(0, 3, n)}
    images = rng.integers(0, 40, (n, 16, 16, 3)).astype(np.uint8)
    for i in range(n):
        column = 2 if labels["left"][i] else 11
        images[i, 2 + 3 * labels["third"][i] :, column : column + 3] = 230 if labels["bright"][i] else 110
    starts = np.cumsum([0, *SUBSETS.values()])
    rows = {s: np.arange(starts[i], starts[i + 1]) for i, s in enumerate(SUBSETS)}
    return TrainingData(
        images=images,
        rows=rows,
        labels={t: {s: labels[t][r].astype(np.int64) for s, r in rows.items()} for t in tasks},
        specs={
            t: TaskSpec(name=t, target=t, classes=tuple(str(c) for c in range(3 if t == "third" else 2))) for t in tasks
        },
        normalisation=Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        flip=flip,
        fingerprint="0" * 64,
    )


TINY_NETWORK = NetworkConfig(split_index=5, head="linear")


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
