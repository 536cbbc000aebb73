"""What a task's endpoint needs of others: somebody who admits, something that infers, somewhere to count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tasks.datasets.table import ImageArray

Verb = Literal["publish", "read", "metadata", "train", "operate"]

Infer: TypeAlias = "Callable[[ImageArray, bytes], Awaitable[NDArray[np.float32]]]"
"""(S, S, 3) uint8 and the image's digest to its feature, (C, H, W): as it may leave the producer."""


class Admission(Protocol):
    """A request that was let in. Not to be kept for another one."""

    @property
    def tenant(self) -> str:
        """Who asks."""
        ...

    def charge(
        self, digests: Sequence[bytes], version: str, bits_per_release: float | None, fresh: bool, features: int
    ) -> None:
        """Book features that are about to be released. Raises `serve.tenants.errors.Refused`: then none may be."""
        ...

    def recheck(self) -> None:
        """Whether it would still be let in. Raises `serve.tenants.errors.Refused`."""
        ...


class Gate(Protocol):
    """Who may ask for what. `serve.tenants.gate.Gate` is the one; many threads may use it."""

    def admit(self, authorization: str | None, *, task: str, verb: Verb, features: int = 0) -> Admission:
        """Let a request in, or raise `serve.tenants.errors.Refused`."""
        ...

    def audit(self, admission: Admission | None, *, task: str, verb: str, outcome: int, detail: str = "") -> None:
        """Write down what came of an admission."""
        ...


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
