"""Data sets, each opened into the one form that the project uses: an `ImageTable`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.datasets.options import DEFAULT_OPTIONS, DatasetOptions
from tasks.datasets.table import ImageTable
from tasks.errors import ConfigError, UnknownNameError

__all__ = ["SOURCES", "DatasetOptions", "open_dataset"]

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
"""Pixels a side. The paper uses 64; the digits are scans of 8x8."""


def _open_digits(path: str, image_size: int, options: DatasetOptions) -> ImageTable:
    from tasks.datasets.digits import open_digits

    if path:
        raise ConfigError(f"the data set digits comes with scikit-learn and takes no path, got {path!r}; write digits")
    return open_digits(image_size=image_size, options=options)


def _open_parquet(path: str, image_size: int, options: DatasetOptions) -> ImageTable:
    from tasks.datasets.parquet import open_parquet

    if not path:
        raise ConfigError("the data set parquet needs the path of a file; write parquet:PATH")
    return open_parquet(path, image_size=image_size, options=options)


SOURCES: Mapping[str, Callable[[str, int, DatasetOptions], ImageTable]] = {
    "digits": _open_digits,
    "parquet": _open_parquet,
}
"""What comes before the colon of a source, to what opens it: given what comes after, the image size and the options."""


def open_dataset(source: str, *, image_size: int = 64, options: DatasetOptions = DEFAULT_OPTIONS) -> ImageTable:
    """Read a data set into memory, with images of ``image_size`` pixels a side.

    ``source`` is ``digits`` or ``parquet:PATH``. The same source, size and options give the same table, to the byte.
    Raises `UnknownNameError`, `ConfigError` or `DataError`.
    """
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ConfigError(f"image_size must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels, got {image_size}")
    kind, _, path = source.partition(":")
    if kind not in SOURCES:
        if source.endswith(".parquet"):
            raise ConfigError(f"the data set {source!r} looks like a file; write parquet:{source}")
        raise UnknownNameError("data set", source, ("digits", "parquet:PATH"))
    return SOURCES[kind](path, image_size, options)
