"""The SQLite file of a ledger: opened or begun, checked for what it is, and written by one at a time.

In WAL mode, so that many processes of one machine may use it at once. It must be on a local disk: WAL does not work
over a network.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from orchestrator.errors import LedgerError

_BUSY_S: Final = 60.0


class LedgerFile:
    """What ledgers have in common. A context manager; a kind of ledger says what its file holds."""

    WHAT: ClassVar[str]
    """What messages call it."""
    APPLICATION_ID: ClassVar[int]
    """By which SQLite tells its files from others."""
    VERSION: ClassVar[int]
    SCHEMA: ClassVar[Sequence[str]]
    """The statements that begin a file."""
    SYNCHRONOUS: ClassVar[str] = "FULL"
    """FULL: what was written survives a power cut. NORMAL: it survives the process, and a power cut may take the last
    of it, never the file."""

    def __init__(self, path: Path) -> None:
        """Open it, or begin a new one. Raises `LedgerError` for a file that is something else, or damaged."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _begin_private(path)
        except OSError as error:
            raise LedgerError(f"cannot open the {self.WHAT} {path}: {error.strerror}") from error
        with self._errors("open"):
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._errors("open"):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        new = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if new:
            self._use_wal()
        self._db.execute(f"PRAGMA synchronous = {self.SYNCHRONOUS}")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA recursive_triggers = ON")  # else REPLACE takes a row out that no DELETE may
        if new:
            self._create()
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if application != self.APPLICATION_ID:
            raise LedgerError(f"{self.path} is an SQLite file, but no {self.WHAT}")
        if version != self.VERSION:
            raise LedgerError(
                f"{self.path} is a ledger of version {version}, this program keeps version {self.VERSION}"
            )

    def _use_wal(self) -> None:
        """SQLite does not wait for others when it changes the journal mode."""
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _create(self) -> None:
        with self._transaction() as db:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return  # another process was faster
            for statement in self.SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {self.APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {self.VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The only writer while it lasts: what was read stays true until what follows from it is written."""
        with self._errors("write"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(f"cannot {doing} the {self.WHAT} {self.path}: {error}") from error


class SharedLedgerFile(LedgerFile):
    """One that many threads may use, too."""

    def __init__(self, path: Path) -> None:
        """Open it, or begin a new one. Raises `LedgerError` for a file that is something else, or damaged."""
        self._one_at_a_time = threading.Lock()
        super().__init__(path)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Of all threads, too."""
        with self._one_at_a_time, super()._transaction() as db:
            yield db

    @contextmanager
    def _reading_once(self) -> Iterator[sqlite3.Connection]:
        """For one statement, which sees one state of the file by itself."""
        with self._one_at_a_time, self._errors("read"):
            yield self._db

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """For several: one state of the file, whatever others write meanwhile."""
        with self._one_at_a_time, self._errors("read"):
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.execute("ROLLBACK")


def _begin_private(path: Path) -> None:
    """An empty file that only its owner can read; SQLite gives those that it puts beside it the same mode."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
