"""What a sweep's processes share: a folder, or a URL that all nodes of a cluster reach.

    encoders/<key>.state     a trained encoder
    ceilings/<key>.json      what attackers read of its universal feature
    trials/<id>.json         a trial that is over: there is no such file before
    weights/<id>.state       its modules and heads, where the best are to be published

Workers exchange nothing else through disks, so they need not share one with the driver. Files are whole or absent.
"""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from orchestrator.checkpoint import load_state, save_state, write_atomically
from orchestrator.errors import ConfigError, MetaMorphosisError, UnavailableError

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(storage: str) -> bool:
    """Whether it names a file system by its protocol; a plain path does not."""
    return _URL.match(storage) is not None


@dataclass(frozen=True)
class Store:
    """Files under one path or URL. Plain data: it travels to workers, and each opens its own connection."""

    root: str

    def within(self, *parts: str) -> Store:
        """A folder in it."""
        return Store("/".join((self.root.rstrip("/"), *parts)))

    @property
    def folder(self) -> Path | None:
        """The local folder, where it is one that was given as a path."""
        return None if is_url(self.root) else Path(self.root)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file. Raises `UnavailableError`."""
        with self._errors("write to"):
            if self.folder is not None:
                write_atomically(self.folder / name, data)
                return
            fs, path = self._open(name)
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if "file" in _protocols(fs):
                write_atomically(Path(path), data)
            else:
                fs.pipe_file(path, data)  # an object is there when it is whole

    def read(self, name: str) -> bytes | None:
        """A file's content, or None. Raises `UnavailableError`."""
        with self._errors("read"):
            fs, path = self._open(name)
            try:
                return bytes(fs.cat_file(path))
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        """Whether there is such a file, as it is now."""
        with self._errors("read"):
            fs, path = self._open(name)
            fs.invalidate_cache()
            return bool(fs.exists(path))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._errors("write to"):
            fs, path = self._open(name)
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                return

    def names(self, folder: str) -> list[str]:
        """The files in a folder."""
        with self._errors("read"):
            fs, path = self._open(folder)
            fs.invalidate_cache()
            if not fs.isdir(path):
                return []
            return sorted(name for found in fs.ls(path, detail=False) if (name := found.rpartition("/")[2])[:1] != ".")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """A JSON file."""
        self.write(name, json.dumps(content, indent=1, allow_nan=False).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, or None."""
        data = self.read(name)
        return None if data is None else dict(json.loads(data))

    def write_state(self, name: str, state: Mapping[str, Any], *, kind: str) -> None:
        """Tensors and numbers; see `orchestrator.checkpoint`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            save_state(path, state, kind=kind)
            self.write(name, path.read_bytes())

    def read_state(self, name: str, *, kind: str) -> dict[str, Any]:
        """What `write_state` wrote. Raises `CheckpointError`, also where there is nothing."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name.rpartition("/")[2]
            data = self.read(name)
            if data is not None:
                path.write_bytes(data)
            return load_state(path, kind=kind)

    def check_writable(self) -> None:
        """Try it. Raises `ConfigError` or `UnavailableError` with what to do."""
        name, content = f".probe-{secrets.token_hex(4)}", b"probe"
        self.write(name, content)
        if self.read(name) != content:
            raise UnavailableError(f"the storage {self.root} does not give back what is written to it")
        self.remove(name)

    def _open(self, name: str) -> tuple[Any, str]:
        fs, root = _filesystem(self.root if is_url(self.root) else f"file://{self.root}")
        return fs, f"{root.rstrip('/')}/{name}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except MetaMorphosisError:
            raise
        except Exception as error:  # every fsspec implementation has errors of its own
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise UnavailableError(
                f"cannot {what} the storage {self.root}: {told[0]}. Choose one that may be written to with --storage"
            ) from error


@lru_cache(maxsize=64)
def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"the storage {url} needs another package: {error}") from error
    except ValueError as error:
        raise ConfigError(f"the storage {url} is of no known kind: {error}") from error
    return fs, str(root)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
