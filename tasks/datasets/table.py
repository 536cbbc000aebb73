"""The one form in which the project holds a data set: decoded images of one size and whole numbers as labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError, UnknownNameError
from tasks.spec import TaskSpec

ImageArray = NDArray[np.uint8]
LabelArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What the paper uses for CelebA and StateFarm."""


def image_set(digests: Iterable[bytes]) -> str:
    """SHA-256, in hex, of a set of images by their digests: the same for any order, and for copies of an image."""
    return hashlib.sha256(b"".join(sorted(set(digests)))).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTable:
    """A data set in memory. It belongs to the producer and never leaves its trust domain."""

    name: str
    images: ImageArray = field(repr=False)
    """(N, S, S, 3) uint8, already resized to the training size."""
    labels: Mapping[str, LabelArray] = field(repr=False)
    """Label column to int64 class indices (N,), or maps of levels (N, C, H, W)."""
    specs: Mapping[str, TaskSpec]
    """Task name to what it is; every spec's target is a key of ``labels``."""
    fingerprint: str
    """Of the content: the same images and labels under another file name have the same one."""
    image_set: str
    """Of the images alone, in any order: what a privacy budget belongs to, whatever labels come with them."""
    normalisation: Normalisation = IMAGENET
    flip: bool = False
    """Whether a horizontally mirrored image means the same for every task."""
    groups: NDArray[np.int64] | None = field(default=None, repr=False)
    """Rows with the same group (a person, a driver) stay in one subset; None groups nothing."""
    skipped: tuple[str, ...] = ()
    """Rows that were left out as corrupt, because the user allowed it: which, and why."""
    unusable: Mapping[str, str] = field(default_factory=dict)
    """Names that look like tasks of this table but are none, with the sentence why."""

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise DataError(f"images must be (N, S, S, 3) uint8, got {self.images.shape} {self.images.dtype}")
        shapes = {spec.target: spec.label_shape for spec in self.specs.values()}
        for column, values in self.labels.items():
            if values.shape != (n, *shapes.get(column, ())):
                raise DataError(f"label column {column!r} has {values.shape} values for {n} images")

    def __len__(self) -> int:
        return len(self.images)

    def spec(self, task: str) -> TaskSpec:
        """The task of that name. Raises `UnknownNameError` with the known ones, or `DataError` with why it is none."""
        if task not in self.specs:
            if (reason := self.unusable.get(task.lower())) is not None:
                raise DataError(reason)
            raise UnknownNameError("task", task, self.specs)
        return self.specs[task]

    def task_labels(self, task: str) -> LabelArray:
        """(N, *label_shape) labels of that task: class indices, or maps of levels."""
        return self.labels[self.spec(task).target]
