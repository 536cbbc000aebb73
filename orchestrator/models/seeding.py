"""Initial weights from a seed, without a trace in the process's own random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.errors import ConfigError

MAX_SEED = 2**64 - 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's CPU generator starts at ``seed`` inside, and is put back afterwards. GPUs' generators are not touched.

    The generator belongs to the process: two threads must not build networks at the same time.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"a seed must be between 0 and {MAX_SEED}, got {seed}")
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs' generators too, which fork_rng was told not to save.
        torch.default_generator.manual_seed(seed)
        yield
