"""What a task's endpoint needs of others, beside the gate: networks, and somewhere to count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from orchestrator.privacy.bounded.keyed_noise import ImageDigests
    from tasks.datasets.table import ImageArray

Encode: TypeAlias = "Callable[[ImageArray, bytes], Awaitable[NDArray[np.float16]]]"
"""(S, S, 3) uint8 and the image's digest to u, (C, H, W)."""

Infer: TypeAlias = "Callable[[NDArray[Any], ImageDigests], NDArray[np.float32]]"
"""What stands for B images, and their digests, to their features, (B, C, H, W), as they may leave the producer.

Blocks. Raises `NonFiniteFeatureError` if one of them has none.
"""


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
