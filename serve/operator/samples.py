"""What is looked at unless somebody brings an image: handwritten digits, which show nobody and are always there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from orchestrator.catalog_records import EncoderRecord
from orchestrator.runs.publishing import settings_of
from tasks.datasets import open_dataset
from tasks.datasets.options import DatasetOptions
from tasks.datasets.splits import split_rows
from tasks.datasets.table import ImageArray, ImageTable
from tasks.spec import TaskSpec

NAME = "digits"
"""Of the data set."""


@dataclass(kw_only=True)
class Samples:
    """The digits in the sizes that are asked for. Many threads may use it."""

    _tables: dict[int, ImageTable] = field(default_factory=dict, repr=False)

    def rows(self, encoders: Iterable[EncoderRecord]) -> NDArray[np.int64]:
        """Those that no encoder was trained on: the test images of those that learned from digits, or else all."""
        n = len(self._table(_SMALLEST))
        tested = [_test_rows(encoder, n) for encoder in encoders if encoder.data["name"] == NAME]
        if not tested:
            return np.arange(n)
        return reduce(np.intersect1d, tested).astype(np.int64)

    def image(self, row: int, size: int) -> ImageArray:
        """(S, S, 3)."""
        found: ImageArray = self._table(size).images[row]
        return found

    def digit(self, row: int) -> int:
        """Which one it is."""
        return int(self._table(_SMALLEST).labels["digit"][row])

    def truth(self, row: int, spec: TaskSpec) -> str | None:
        """Its class in a task of the digits; None for another task."""
        table = self._table(_SMALLEST)
        if table.specs.get(spec.name) is None or table.specs[spec.name].classes != spec.classes:
            return None
        return spec.classes[int(table.task_labels(spec.name)[row])]

    def _table(self, size: int) -> ImageTable:
        if size not in self._tables:
            self._tables[size] = open_dataset(NAME, image_size=size, options=DatasetOptions())
        return self._tables[size]


_SMALLEST = 8


def _test_rows(encoder: EncoderRecord, n: int) -> NDArray[np.int64]:
    settings = settings_of(encoder, None)
    return split_rows(n, seed=settings.split_seed, fractions=settings.fractions).test
