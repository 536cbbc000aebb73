"""A parquet file from outside: whether it is one, and which of its columns are good for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tasks.datasets.columns import is_label_type
from tasks.datasets.options import DatasetOptions
from tasks.errors import DataError, UnknownNameError

IMAGE = "image"
"""The column of encoded images."""
_MAGIC = b"PAR1"
_MIN_BYTES = 12
"""Magic, length of the footer, magic."""


def find_file(path: str) -> Path:
    """The file that a user means; ``~`` is a home. Raises `DataError` unless it looks like a whole parquet file."""
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path} cannot be read ({error}); write the path in full") from None
    _check_file(file)
    return file


def _check_file(file: Path) -> None:
    try:
        if file.is_dir():
            raise DataError(
                f"{file} is a folder; the parquet source reads one file: name it, as parquet:{file}/NAME.parquet"
            )
        if not file.exists():
            raise DataError(f"there is no file {file} (seen from {Path.cwd()}); check the path after parquet:")
        if not file.is_file():
            raise DataError(f"{file} is a device or a pipe; the parquet source needs a regular file")
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(len(_MAGIC))
            stream.seek(-min(size_bytes, len(_MAGIC)), 2)
            tail = stream.read(len(_MAGIC))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check the path and its permissions") from None
    if size_bytes == 0:
        raise DataError(f"{file} is empty (0 bytes); write or copy it again")
    if head != _MAGIC:
        raise DataError(f"{file} is not a parquet file: it starts with {head!r} instead of {_MAGIC!r}")
    if tail != _MAGIC or size_bytes < _MIN_BYTES:
        raise DataError(f"{file} is cut short: its {size_bytes:,} bytes lack a parquet footer; write or copy it again")


@contextmanager
def parquet_errors(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file (bad UTF-8 where a column's name is damaged) into a `DataError`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} is damaged or not readable by pyarrow ({what}); write or copy it again") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which columns a file has, by what they are good for."""

    file: Path
    nested: bool
    """Whether ``image`` is a struct that holds the bytes."""
    labels: tuple[str, ...]
    refused: dict[str, str]
    """Columns that cannot hold labels, with the reason."""

    @classmethod
    def of(cls, schema: pa.Schema, file: Path) -> Layout:
        """Of a file's schema. Raises `DataError` without a readable image column."""
        if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
            raise DataError(f"{file} has more than one column named {', '.join(map(repr, twice))}; rename one of them")
        if IMAGE not in schema.names:
            known = ", ".join(schema.names) or "(none)"
            raise DataError(
                f"{file} has no column {IMAGE!r}; its columns: {known}. Rename the one that holds the encoded images"
            )
        kind = schema.field(IMAGE).type
        nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not _is_binary(kind.field("bytes").type if nested else kind):
            raise DataError(
                f"column {IMAGE!r} of {file} holds {kind}; it must hold the bytes of encoded images (JPEG, PNG ...) "
                "as binary: store the files' content, not their paths or pixels"
            )
        others = [name for name in schema.names if name != IMAGE]
        labels = tuple(name for name in others if is_label_type(schema.field(name).type))
        reason = (
            "column {!r} holds {}; labels are text, whole numbers or booleans: convert it, or choose another column"
        )
        refused = {name: reason.format(name, schema.field(name).type) for name in others if name not in labels}
        return cls(file=file, nested=nested, labels=labels, refused=refused)

    def check(self, options: DatasetOptions) -> None:
        """Raise unless the columns that the user names are there and of a fit type."""
        group_by = () if options.group_by is None else (options.group_by,)
        asked = {"label column": options.columns, "group_by column": group_by}
        for what, names in asked.items():
            for name in names:
                if name in self.refused:
                    raise DataError(f"{self.file}: {self.refused[name]}")
                if name not in self.labels:
                    raise UnknownNameError(f"{what} of {self.file}", name, self.labels)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        (
            types.is_binary(kind),
            types.is_large_binary(kind),
            types.is_binary_view(kind),
            types.is_fixed_size_binary(kind),
        )
    )
