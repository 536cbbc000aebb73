"""Which examples make up the batch of a step.

A batch is a function of (seed, step) alone. Asking for a step again, after a crash or from another process, gives the
same examples, and there is no cursor to save.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError

IdArray = NDArray[np.int64]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """An independent 63-bit seed for one purpose of a run, such as ``derive_seed(seed, "module", task)``.

    Seeds are derived by hashing, not by adding: two purposes, or two tasks, never share a random stream, and a task's
    stream does not depend on which other tasks are trained beside it.
    """
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class BatchSampler(Protocol):
    """Chooses example ids in ``range(n)``."""

    @property
    def steps_per_epoch(self) -> int:
        """How many steps see each example once (for Poisson sampling: once in expectation)."""
        ...

    def ids(self, step: int) -> IdArray:
        """The example ids of that step."""
        ...


class ShuffledBatches:
    """A fresh permutation every epoch, cut into batches; the last one of an epoch may be smaller."""

    def __init__(self, n: int, *, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, the smaller last one included."""
        return math.ceil(self.n / self.batch_size)

    def ids(self, step: int) -> IdArray:
        """The example ids of that step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(self.n)
        return order[position * self.batch_size : (position + 1) * self.batch_size].astype(np.int64)


class PoissonBatches:
    """Every example enters every batch independently with probability ``sample_rate``: what DP accounting assumes.

    Batches differ in size and may be empty. An empty one is a step like any other: it is noised and charged.
    """

    def __init__(self, n: int, *, batch_size: int, seed: int) -> None:
        if batch_size > n:
            raise ConfigError(f"batch size {batch_size} is larger than the training subset ({n} images): lower it")
        self.n, self.batch_size, self.seed = n, batch_size, seed

    @property
    def sample_rate(self) -> float:
        """q, the probability that an example enters a batch."""
        return self.batch_size / self.n

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which an example is drawn once in expectation."""
        return max(1, round(self.n / self.batch_size))

    def ids(self, step: int) -> IdArray:
        """The example ids of that step, possibly none."""
        drawn = np.random.default_rng(derive_seed(self.seed, "step", step)).random(self.n) < self.sample_rate
        return np.flatnonzero(drawn).astype(np.int64)
