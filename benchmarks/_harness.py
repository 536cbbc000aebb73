"""What every benchmark shares: synthetic data, interleaved timing, and the one line at the end.

Both sides of a ratio are measured in the same run, in turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.assembly import SessionConfig, SessionPlan, TrainingData
from orchestrator.memory import keep_freed_memory
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from tasks.datasets.table import IMAGENET
from tasks.losses import cross_entropy
from tasks.spec import TaskSpec

BATCH = 64
IMAGE_SIZE = 64


def arguments(description: str) -> argparse.Namespace:
    """``--json FILE`` writes every figure."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each measures both sides once")
    keep_freed_memory()  # both sides run with the allocator as our own processes set it
    return parser.parse_args()


def synthetic_data(tasks: int, *, batches: int = 2) -> TrainingData:
    """Random images and labels: benchmarks measure time, not accuracy."""
    rng = np.random.default_rng(0)
    n = BATCH * batches
    rows = {"train": np.arange(n), **{s: np.arange(8) for s in ("validation", "attacker", "test")}}
    names = [f"task{i}" for i in range(tasks)]
    labels = rng.integers(0, 10, (tasks, n))
    return TrainingData(
        images=rng.integers(0, 256, (n, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
        rows=rows,
        labels={t: {s: labels[i][r].astype(np.int64) for s, r in rows.items()} for i, t in enumerate(names)},
        specs={t: TaskSpec(name=t, target=t, classes=tuple(map(str, range(10)))) for t in names},
        normalisation=IMAGENET,
        flip=False,
        fingerprint=f"benchmark-{n}-{IMAGE_SIZE}",
    )


def session_plan(
    tasks: int, cache: Path, *, split_index: int = 6, head: str = "backbone", omega: float = 0.0, **overrides: Any
) -> SessionPlan:
    """Phase 2 on a frozen, random ResNet-18 encoder, as the paper cuts it."""
    network = NetworkConfig(split_index=split_index, head=head)
    return SessionPlan(
        data=synthetic_data(tasks),
        network=network,
        config=SessionConfig(epochs=10_000, batch_size=BATCH),
        dissimilarity=DissimilarityConfig(omega=omega),
        seed=0,
        encoder=network.build_encoder(seed=0).state_dict(),
        cache_root=cache,
        device="cpu",
        threads=os.cpu_count(),
        **overrides,
    )


class PlainTask:
    """One task's module and head in plain PyTorch: the same mathematics in the fewest lines."""

    def __init__(self, plan: SessionPlan, task: str) -> None:
        spec = plan.data.specs[task]
        size = plan.data.image_size
        self.module = plan.network.build_modules([task], size, seed=0)[task]
        self.head = plan.network.build_heads({task: spec.n_outputs}, size, seed=0)[task]
        self.optimiser = torch.optim.AdamW([*self.module.parameters(), *self.head.parameters()], lr=1e-3)
        self.targets = torch.from_numpy(plan.data.labels[task]["train"])

    def step(self, u: Tensor, ids: np.ndarray) -> None:
        """Forward, backward, update."""
        loss = cross_entropy(self.head(self.module(u)), self.targets[ids]).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()


def encoder_features(plan: SessionPlan) -> Tensor:
    """u of every training image, as float32."""
    from tasks.transforms import to_tensor

    encoder = plan.network.build_encoder(seed=0)
    encoder.load_state_dict(dict(plan.encoder or {}))
    return run_encoder(encoder, to_tensor(plan.data.images, plan.data.normalisation))


def run_encoder(encoder: nn.Module, x: Tensor) -> Tensor:
    """Without a graph."""
    with torch.no_grad():
        return torch.cat([encoder(part) for part in x.split(BATCH)])


def free_port(host: str = "127.0.0.1") -> int:
    """That nobody listens at, for now."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def seconds(work: Callable[[], object], *, repeat: int = 1) -> float:
    """Of one call, averaged over ``repeat``."""
    started = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - started) / repeat


def paired(
    a: Callable[[], object], b: Callable[[], object], *, rounds: int, repeat: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns, after one round that is not counted."""
    a(), b()
    times = [(seconds(a, repeat=repeat), seconds(b, repeat=repeat)) for _ in range(rounds)]
    return [x for x, _ in times], [y for _, y in times]


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def finish(name: str, value: float, target: float, *, figures: Mapping[str, Any], to: Path | None) -> bool:
    """Print the line that counts. True when the target is met."""
    ok = value <= target
    if to is not None:
        to.write_text(json.dumps({"name": name, "ratio": value, "target": target, "ok": ok, **figures}, indent=2))
    print(f"{name} {value:.3f} target <= {target:g}: {'ok' if ok else 'short'}", flush=True)
    return ok
