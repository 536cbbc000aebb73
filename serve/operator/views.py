"""What the page shows, as plain values: made where the catalog and the networks are, drawn where the browser asks.

A picture is the bytes of a PNG file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionView:
    """One version of a task that is served."""

    version: str
    encoder_version: str
    share: float
    """Of the images, between 0 and 1."""
    canary: bool = False
    card: Mapping[str, Any] | None = None
    """`serve.model.TaskCard` as JSON: who draws the page loads no networks."""
    own: float | None = None
    """Accuracy of its own head on test images; None where that was not measured."""
    leakage: Mapping[str, Any] | None = None
    """See `serve.leakage.measured`; None: it was not."""
    fault: str = ""
    """Why the rest is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskView:
    """One task, with every version that answers."""

    task: str
    catalog: str
    versions: tuple[VersionView, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Everything that is to be served."""

    tasks: tuple[TaskView, ...]
    samples: int
    """Digits that can be looked at, numbered from 1."""
    pictures: bool
    """Whether an image that is brought, its features and what decoders make of them are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """What a decoder made of one feature, and how good that decoder is."""

    picture: bytes | None = field(default=None, repr=False)
    state: str
    """ready, waiting, none."""
    text: str
    """How good it is on images that it never saw; or why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureView:
    """One feature of the image: maps, and what can be got back from them."""

    name: str
    maps: bytes | None = field(default=None, repr=False)
    """None where it may not be drawn."""
    text: str
    """Shape, and which of its maps are drawn."""
    reconstruction: Reconstruction


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one head says of one feature."""

    label: str
    share: float
    """Of the probability, between 0 and 1."""
    own: bool
    """Whether the head was trained on this feature."""
    right: bool | None = None
    """None where the truth is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Swap:
    """Each head's answer on each feature."""

    heads: tuple[str, ...]
    truths: tuple[str | None, ...]
    """Of each head's task for this image."""
    rows: tuple[tuple[str, tuple[Answer | None, ...]], ...]
    """Feature, and an answer a head; None where the head does not take a feature of that shape."""
    missing: tuple[str, ...]
    """Tasks whose head is not here: their tenants keep it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One image through everything that is served."""

    title: str
    picture: bytes | None = field(default=None, repr=False)
    features: tuple[FeatureView, ...]
    encoders: tuple[FeatureView, ...]
    """What no tenant receives."""
    swap: Swap
    withheld: str = ""
    """Why pictures are missing."""
    faults: tuple[str, ...] = ()
    """What could not be looked at, and why."""

    @property
    def waiting(self) -> bool:
        """Whether a decoder is still being trained."""
        return any(view.reconstruction.state == "waiting" for view in (*self.features, *self.encoders))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why there is nothing to look at: an image that is none, or a number of none."""

    reason: str


class Viewer(Protocol):
    """Where the catalog and the networks are: in this process, or behind a handle of Ray Serve."""

    async def served(self) -> Served:
        """What is to be served, as the catalog describes it."""
        ...

    async def look(self, *, sample: int, image: bytes | None) -> Look | Unreadable:
        """At an encoded image, which is not kept; or at the digit of that number, which goes round."""
        ...
