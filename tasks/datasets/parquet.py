"""Bring your own images: a parquet file with one row an image, an ``image`` column of encoded bytes, and label columns.

Every column of text, whole numbers or booleans is a task, named after the column in lower case; its classes are the
sorted distinct values. A column that cannot be a task is left out, and says why when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.datasets.columns import LabelColumn, build_tasks, encode_column, fingerprint, task_name
from tasks.datasets.decoding import decode_image
from tasks.datasets.options import DatasetOptions
from tasks.datasets.parquet_file import IMAGE, Layout, find_file, parquet_errors
from tasks.datasets.table import IMAGENET, ImageArray, ImageTable, image_set
from tasks.errors import DataError

_BATCH_ROWS = 256
"""Encoded images held at once."""
_JOB_ROWS = 16
"""Images decoded per job of the thread pool: for one small image, handing it over costs more than decoding it."""


def open_parquet(path: str, *, image_size: int, options: DatasetOptions) -> ImageTable:
    """Read and decode a whole file into memory.

    The fingerprint is of the encoded images and of all text, whole-number and boolean columns, in row order, whichever
    of them `DatasetOptions.columns` chooses: it does not change with the file's name, compression, row groups, column
    order or with ``image_size``. Raises `DataError` or `UnknownNameError` for whatever is wrong with the file.
    """
    file = find_file(path)
    with parquet_errors(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        layout = Layout.of(parquet.schema_arrow, file)
        layout.check(options)
        content = _read(parquet, layout, image_size=image_size, skip_corrupt=options.skip_corrupt)
    columns, refused = _encode(content, layout)
    return _table(content, columns, refused, options, file)


@dataclass(kw_only=True, slots=True)
class _Content:
    """What has been read so far."""

    images: ImageArray
    labels: dict[str, list[pa.Array]]
    rows: list[int] = field(default_factory=list)
    """Row numbers in the file of the images that could be read."""
    skipped: list[str] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """Of the encoded images, each with its length in front."""
    image_digests: list[bytes] = field(default_factory=list)

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """(n kept,)."""
        return np.array(self.rows, dtype=np.int64)


def _read(parquet: pq.ParquetFile, layout: Layout, *, image_size: int, skip_corrupt: bool) -> _Content:
    n, file = parquet.metadata.num_rows, layout.file
    if n == 0:
        raise DataError(f"{file} has no rows; a data set needs images")
    content = _Content(images=_allocate(n, image_size, file), labels={name: [] for name in layout.labels})
    seen = 0
    with ThreadPoolExecutor(_n_cpus()) as pool:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=[IMAGE, *layout.labels]):
            encoded = _encoded_images(batch, nested=layout.nested)
            first, seen = seen, seen + len(encoded)
            if seen > n:
                break
            decoded = _decode_all(encoded, pool, image_size)
            keep = [
                _keep(content, row, data, pixels, file, skip_corrupt=skip_corrupt)
                for row, data, pixels in zip(range(first, seen), encoded, decoded, strict=True)
            ]
            for name, chunks in content.labels.items():
                chunks.append(batch.column(name).filter(pa.array(keep)))
    if seen != n:
        raise DataError(f"{file} announces {n} rows and holds another number: it is damaged; write or copy it again")
    if not content.rows:
        raise DataError(f"none of the {n} images of {file} can be read: {content.skipped[0]}")
    content.images = content.images[: len(content.rows)]
    return content


def _keep(
    content: _Content, row: int, data: bytes | None, pixels: ImageArray | DataError, file: Path, *, skip_corrupt: bool
) -> bool:
    """Add one image, or note that it is corrupt."""
    if isinstance(pixels, DataError):
        if not skip_corrupt:
            raise DataError(
                f"the image of row {row} (from 0) of {file} cannot be used: {pixels}; "
                "mend it, or leave such rows out with --skip-corrupt"
            )
        content.skipped.append(f"row {row}: {pixels}")
        return False
    assert data is not None
    content.images[len(content.rows)] = pixels
    content.rows.append(row)
    content.digest.update(len(data).to_bytes(8, "little") + data)
    content.image_digests.append(hashlib.sha256(data).digest())
    return True


def _decode_all(encoded: list[bytes | None], pool: Executor, image_size: int) -> list[ImageArray | DataError]:
    jobs = [encoded[i : i + _JOB_ROWS] for i in range(0, len(encoded), _JOB_ROWS)]
    return [result for job in pool.map(lambda job: [_decode(data, image_size) for data in job], jobs) for result in job]


def _decode(data: bytes | None, image_size: int) -> ImageArray | DataError:
    """Pixels, or what is wrong with the image."""
    if data is None:
        return DataError("it is null")
    try:
        return decode_image(data, image_size)
    except DataError as error:
        return error


def _encode(content: _Content, layout: Layout) -> tuple[list[LabelColumn], dict[str, str]]:
    """All label columns, and which columns cannot be one."""
    columns, refused = [], dict(layout.refused)
    for name, chunks in content.labels.items():
        try:
            columns.append(encode_column(name, pa.chunked_array(chunks)))
        except UnicodeDecodeError:
            refused[name] = f"column {name!r} holds text that is not UTF-8: write it again with that encoding"
    return columns, refused


def _table(
    content: _Content, columns: list[LabelColumn], refused: dict[str, str], options: DatasetOptions, file: Path
) -> ImageTable:
    chosen = [c for c in columns if not options.columns or c.name in options.columns]
    tasks = build_tasks(chosen, content.row_numbers, refused)
    for name in options.columns:
        if (reason := tasks.unusable.get(task_name(name))) is not None:
            raise DataError(f"{file}: {reason}")
    if not tasks.specs:
        reasons = "; ".join(tasks.unusable.values()) or f"{IMAGE!r} is the only column"
        raise DataError(f"no column of {file} can be a task: {reasons}")
    return ImageTable(
        name=file.stem,
        images=content.images,
        labels=tasks.labels,
        specs=tasks.specs,
        unusable=tasks.unusable,
        fingerprint=fingerprint(content.digest.digest(), columns),
        image_set=image_set(content.image_digests),
        normalisation=IMAGENET,
        flip=bool(options.flip),
        groups=_groups(columns, options.group_by, content.row_numbers, file),
        skipped=tuple(content.skipped),
    )


def _groups(
    columns: list[LabelColumn], group_by: str | None, rows: NDArray[np.int64], file: Path
) -> NDArray[np.int64] | None:
    if group_by is None:
        return None
    codes = {c.name: c.codes for c in columns}.get(group_by)
    if codes is None:
        raise DataError(f"{file}: column {group_by!r} holds text that is not UTF-8: write it again with that encoding")
    if (blank := np.flatnonzero(codes < 0)).size:
        raise DataError(
            f"group_by column {group_by!r} of {file} has no value in row {rows[blank[0]]} (from 0); "
            "every image needs a group: fill it in, or drop the row"
        )
    return codes


def _encoded_images(batch: pa.RecordBatch, *, nested: bool) -> list[bytes | None]:
    images = batch.column(IMAGE)
    encoded: list[bytes | None] = (pc.struct_field(images, "bytes") if nested else images).to_pylist()
    return encoded


def _allocate(n: int, image_size: int, file: Path) -> ImageArray:
    try:
        return np.empty((n, image_size, image_size, 3), dtype=np.uint8)
    except (MemoryError, ValueError):
        raise DataError(
            f"{n:,} images of {file} at {image_size}x{image_size} need {n * image_size**2 * 3 / 2**30:,.1f} GiB, "
            "more memory than there is: choose a smaller --image-size, or fewer rows"
        ) from None


def _n_cpus() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
