"""A tiny data set with real structure, and the networks that go with it: what many tests stand on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orchestrator.assembly import TrainingData
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.bounded.channel import ChannelConfig
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
BOUNDED_NETWORK = BoundedNetworkConfig.of(TINY_NETWORK, ChannelConfig(dimensions=4, noise=0.5))
