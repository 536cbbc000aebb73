"""What a task's endpoint needs of others, beside the gate: something that infers, and somewhere to count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tasks.datasets.table import ImageArray

Infer: TypeAlias = "Callable[[ImageArray, bytes], Awaitable[NDArray[np.float32]]]"
"""(S, S, 3) uint8 and the image's digest to its feature, (C, H, W): as it may leave the producer."""


class Meter(Protocol):
    """Counts what is asked, per tenant. Names and numbers only."""

    def request(self, *, tenant: str, task: str, verb: str, status: int, seconds: float) -> None:
        """One answered request; ``tenant`` is empty where nobody proved to be anybody."""
        ...

    def released(self, *, tenant: str, task: str, version: str, features: int, size_bytes: int) -> None:
        """Features that left."""
        ...


class NoMeter:
    """Counts nothing."""

    def request(self, *, tenant: str, task: str, verb: str, status: int, seconds: float) -> None:
        """See `Meter.request`."""

    def released(self, *, tenant: str, task: str, version: str, features: int, size_bytes: int) -> None:
        """See `Meter.released`."""
