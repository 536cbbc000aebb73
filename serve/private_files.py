"""Files that only their owner may read: tokens and keys."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import DataError


@contextmanager
def private_file(path: Path, *, what: str, replace: bool = False) -> Iterator[PrivateFile]:
    """A file to be written once, in full or not at all; whether it can be is known before the block runs.

    Raises `DataError` where there is one already and ``replace`` is false, or where none can be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise DataError(f"{path} is a folder: name a file for {what}")
        if not replace and os.path.lexists(path):
            raise DataError(f"there is a file {path} already: {what} goes into a new one")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataError(f"cannot write {what} to {path}: {error.strerror or error}") from error
    try:
        yield PrivateFile(path, what, temporary, descriptor, replace=replace)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


class PrivateFile:
    """What `private_file` has open."""

    def __init__(self, path: Path, what: str, temporary: Path, descriptor: int, *, replace: bool) -> None:
        self.path = path
        self._what, self._temporary, self._descriptor, self._replace = what, temporary, descriptor, replace

    def write(self, data: bytes) -> None:
        """All of it; it is on the disk when this returns. Raises `DataError`."""
        try:
            with os.fdopen(os.dup(self._descriptor), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if self._replace:
                self._temporary.replace(self.path)
            else:
                self.path.hardlink_to(self._temporary)  # fails where somebody else was faster
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise DataError(f"cannot write {self._what} to {self.path}: {error.strerror or error}") from error


def write_private(path: Path, data: bytes, *, what: str, replace: bool = False) -> None:
    """Write such a file. Raises `DataError`."""
    with private_file(path, what=what, replace=replace) as file:
        file.write(data)


def read_private(path: Path, *, what: str, most: int = 1 << 16) -> bytes:
    """What such a file holds. Raises `DataError` if others can read it, it is larger than ``most``, or not there."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise DataError(f"others can read {what} in {path}: chmod 600 {path}")
            data = file.read(most + 1)
    except OSError as error:
        raise DataError(f"cannot read {what} in {path}: {error.strerror or error}") from error
    if len(data) > most:
        raise DataError(f"{path} is too large for {what}, which has at most {most} bytes")
    return data
