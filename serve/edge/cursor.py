"""Where a tenant is in its task's features: the last number that was handed out, in memory or in a file. Python 3.9."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError, DataError

_FORMAT = 1


class Cursor:
    """Owned by one client. A killed process leaves the number before or the one after, never half of one."""

    def __init__(self, path: Path | None, url: str, task: str, after: int) -> None:
        self._path, self._url, self._task, self.after = path, url, task, after

    @classmethod
    def open(cls, path: str | Path | None, url: str, task: str, after: int) -> Cursor:
        """From the file, if there is one; else from ``after``. Raises `DataError` for a file of something else."""
        if after < 0:
            raise ConfigError(f"features are numbered from 1: go on after 0 or more, got {after}")
        if path is None:
            return cls(None, url, task, after)
        path = Path(path)
        cursor = cls(path, url, task, after)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            cursor._write()  # a folder that cannot be written to shows before anything is handed out
            return cursor
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        cursor.after = max(after, cursor._read(text))
        return cursor

    def move(self, after: int) -> None:
        """Everything up to that number was handed out."""
        if after != self.after:
            self.after = after
            self._write()

    def _read(self, text: str) -> int:
        try:
            found: Any = json.loads(text)
            after = found["after"]
            known = (found["format"], found["url"], found["task"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._path} does not hold the place in a stream: name another file") from error
        if known != (_FORMAT, self._url, self._task) or not isinstance(after, int) or after < 0:
            raise DataError(
                f"{self._path} holds the place in another stream ({found['task']} of {found['url']}): name another file"
            )
        return after

    def _write(self) -> None:
        if self._path is None:
            return
        text = json.dumps({"format": _FORMAT, "url": self._url, "task": self._task, "after": self.after})
        try:
            handle, temporary = tempfile.mkstemp(dir=str(self._path.parent), prefix=f".{self._path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(self._path)
        except OSError as error:
            raise DataError(f"cannot keep the place in the stream in {self._path}: {error}") from error
