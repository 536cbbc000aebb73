"""From a column of a table to the labels of a task, or to the reason why it cannot be one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.datasets.table import LabelArray
from tasks.errors import ConfigError
from tasks.spec import TaskSpec

MAX_CLASSES = 1000
"""A column with more values is a name, a number or a text, not a class (ImageNet has 1000)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelColumn:
    """One column's values as class indices."""

    name: str
    classes: tuple[str, ...]
    """Distinct values, sorted; whole numbers by size."""
    codes: LabelArray = field(repr=False)
    """(N,) class indices; -1 where the value is null or blank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """What a table's columns can be used for."""

    labels: Mapping[str, LabelArray]
    specs: Mapping[str, TaskSpec]
    unusable: Mapping[str, str]
    """Name that the task would have, to the sentence why there is none."""


def is_label_type(kind: pa.DataType) -> bool:
    """Whether values of this type name classes: text, whole numbers, booleans, or a dictionary of those."""
    if pa.types.is_dictionary(kind):
        return is_label_type(kind.value_type)
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or _is_text(kind)


def encode_column(name: str, values: pa.ChunkedArray) -> LabelColumn:
    """Class indices of a column. Raises `UnicodeDecodeError` when its text is not UTF-8."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if _is_text(values.type):
        values = values.cast(pa.large_string())
    encoded = pc.dictionary_encode(values.combine_chunks())
    distinct = encoded.dictionary.to_pylist()
    classes = sorted(v for v in distinct if str(v).strip())
    rank = {value: i for i, value in enumerate(classes)}
    index = np.array([*(rank.get(v, -1) for v in distinct), -1], dtype=np.int64)
    codes = index[encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)]
    return LabelColumn(name=name, classes=tuple(map(_class_name, classes)), codes=codes)


def build_tasks(columns: Iterable[LabelColumn], rows: NDArray[np.int64], refused: Mapping[str, str]) -> Tasks:
    """One task a column, named after it in lower case.

    ``rows`` are the columns' row numbers in the file, for messages; ``refused`` columns are known to be unusable.
    """
    unusable = {task_name(name): reason for name, reason in refused.items()}
    usable: dict[str, list[LabelColumn]] = {}
    for column in columns:
        if reason := refusal(column, rows):
            unusable[task_name(column.name)] = reason
        else:
            usable.setdefault(task_name(column.name), []).append(column)
    for task, same in usable.items():
        if len(same) > 1:
            names = " and ".join(repr(c.name) for c in same)
            unusable[task] = f"columns {names} would all be task {task!r}: rename all but one"
    single = {task: same[0] for task, same in usable.items() if len(same) == 1}
    return Tasks(
        labels={c.name: c.codes for c in single.values()},
        specs={task: TaskSpec(name=task, target=c.name, classes=c.classes) for task, c in single.items()},
        unusable={task: reason for task, reason in unusable.items() if task not in single},
    )


def task_name(column: str) -> str:
    """The name of a column's task."""
    return column.lower()


def refusal(column: LabelColumn, rows: NDArray[np.int64]) -> str | None:
    """Why a column cannot be a task, as a sentence; None if it can."""
    what, n, n_classes = f"column {column.name!r}", len(column.codes), len(column.classes)
    if (blank := np.flatnonzero(column.codes < 0)).size:
        return (
            f"{what} has no value in {blank.size} of {n} rows, the first is row {rows[blank[0]]} (from 0); "
            "every image needs a label: fill it in, or drop the row"
        )
    if n_classes < 2:
        return f"{what} has one class ({column.classes[0]!r}); a task needs at least two: choose another column"
    if n_classes > MAX_CLASSES or n_classes > n / 2:
        return (
            f"{what} has {n_classes} different values in {n} rows; a task's classes are at most {MAX_CLASSES} and at "
            "most half as many as rows: choose another column, or bin its values"
        )
    try:
        TaskSpec(name=task_name(column.name), target=column.name, classes=column.classes)
    except ConfigError as error:
        return f"{what} cannot name a task; rename it: {error}"
    return None


def fingerprint(images: bytes, columns: Iterable[LabelColumn]) -> str:
    """SHA-256, in hex, of a digest of the images and of every label in row order; columns in any order."""
    digest = hashlib.sha256(images)
    for column in sorted(columns, key=lambda c: c.name):
        header = json.dumps([column.name, column.classes]).encode()
        digest.update(len(header).to_bytes(8, "little") + header + column.codes.astype("<i8").tobytes())
    return digest.hexdigest()


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any((types.is_string(kind), types.is_large_string(kind), types.is_string_view(kind)))


def _class_name(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
