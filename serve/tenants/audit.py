"""The audit log: who asked for what, when, and what came of it. Lines are only ever added, and none can be changed.

Every line carries a digest of itself and of the line before it, so a line that was changed, put in or taken out shows
(`verify`). Whoever can write to the file could make the whole chain anew, or cut its end off: note the head from time
to time where that person cannot write, and `verify` against it.

What is in a line is names and numbers; features, images, labels and secrets have no place in it. Lines survive the
process that wrote them; a power cut may take the last ones.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Final

from orchestrator.errors import LedgerError
from orchestrator.privacy.ledger_file import SharedLedgerFile

_BEGINNING: Final = hashlib.sha256(b"metamorphosis audit v1").digest()
_LONGEST: Final = {"tenant": 64, "token": 64, "task": 64, "verb": 32, "detail": 300}

_SCHEMA: Final = (
    """CREATE TABLE lines (
        number INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        tenant TEXT NOT NULL,
        token TEXT NOT NULL,
        task TEXT NOT NULL,
        verb TEXT NOT NULL,
        outcome INTEGER NOT NULL,
        detail TEXT NOT NULL,
        digest BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX lines_of_tenant ON lines (tenant, number)",
    """CREATE TRIGGER lines_do_not_change BEFORE UPDATE ON lines
    BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END""",
    """CREATE TRIGGER lines_stay BEFORE DELETE ON lines
    BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END""",
)
_COLUMNS: Final = "number, at, tenant, token, task, verb, outcome, detail"
_values: Final = attrgetter(*_COLUMNS.split(", "))
"""Of a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """What is to be written: see `AuditLine`."""

    tenant: str
    token: str
    task: str
    verb: str
    outcome: int
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditLine:
    """One thing that was asked for."""

    number: int
    """From 1, without a gap."""
    at: float
    """Unix time."""
    tenant: str
    """Who; empty where nobody proved to be anybody."""
    token: str
    """The id of the token, which is no secret."""
    task: str
    verb: str
    outcome: int
    """An HTTP status."""
    detail: str


@dataclass(frozen=True, slots=True)
class AuditHead:
    """How long the log is and what its last line is: all of the log is in it."""

    lines: int
    digest: bytes

    def __str__(self) -> str:
        return f"{self.lines}:{self.digest.hex()}"

    @classmethod
    def parse(cls, text: str) -> AuditHead:
        """What ``str`` gave. Raises `LedgerError`."""
        lines, _, digest = text.partition(":")
        try:
            return cls(int(lines), bytes.fromhex(digest))
        except ValueError as error:
            raise LedgerError(f"{text!r} is no head of an audit log: it is LINES:DIGEST") from error


class AuditLog(SharedLedgerFile):
    """The log of one registry. A context manager; many threads and processes may write to it."""

    WHAT = "audit log"
    APPLICATION_ID = 0x4D4D4155
    VERSION = 1
    SCHEMA = _SCHEMA
    SYNCHRONOUS = "NORMAL"

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open it, or begin a new one. Raises `LedgerError` for a file that is something else, or damaged."""
        super().__init__(path)
        self._clock = clock

    def write(self, *, tenant: str, token: str, task: str, verb: str, outcome: int, detail: str) -> None:
        """`write_all` of one line."""
        self.write_all([AuditEntry(tenant=tenant, token=token, task=task, verb=verb, outcome=outcome, detail=detail)])

    def write_all(self, entries: Sequence[AuditEntry]) -> None:
        """Add a line each, or none. What is too long is cut off, and what cannot be printed is escaped."""
        cleaned = [
            {key: _clean(getattr(entry, key), longest) for key, longest in _LONGEST.items()} for entry in entries
        ]
        with self._transaction() as db:
            head = _head(db)
            for entry, texts in zip(entries, cleaned, strict=True):
                line = AuditLine(number=head.lines + 1, at=self._clock(), outcome=int(entry.outcome), **texts)
                head = AuditHead(line.number, _digest(head.digest, line))
                db.execute(
                    f"INSERT INTO lines ({_COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                    (*_values(line), head.digest),
                )

    def lines(self, *, tenant: str | None = None, last: int = 100) -> list[AuditLine]:
        """The newest, oldest of them first."""
        query = f"SELECT {_COLUMNS} FROM lines WHERE tenant = coalesce(?, tenant) ORDER BY number DESC LIMIT ?"  # noqa: S608
        with self._reading() as db:
            rows = db.execute(query, (tenant, last)).fetchall()
        return [_line(row) for row in reversed(rows)]

    def head(self) -> AuditHead:
        """The newest."""
        with self._reading() as db:
            return _head(db)

    def verify(self, noted: AuditHead | None = None) -> AuditHead:
        """Go through the whole chain, and see that the head that was noted once is in it. Returns the head.

        Raises `LedgerError`, naming the first line that does not fit.
        """
        with self._reading() as db:
            return _verify(db, noted)


def _verify(db: sqlite3.Connection, noted: AuditHead | None) -> AuditHead:
    head, seen = AuditHead(0, _BEGINNING), noted is None or noted.lines == 0
    for line, digest in _chain(db):
        if line.number != head.lines + 1:
            raise LedgerError(f"the audit log was tampered with: line {head.lines + 1} is missing")
        head = AuditHead(line.number, _digest(head.digest, line))
        if head.digest != digest:
            raise LedgerError(f"the audit log was tampered with: line {line.number} is not the one that was written")
        if noted is not None and noted.lines == head.lines:
            if noted != head:
                raise LedgerError(f"the audit log was tampered with: line {line.number} is not the one that was noted")
            seen = True
    if not seen and noted is not None:
        raise LedgerError(
            f"the audit log was tampered with: it has {head.lines} lines, and had {noted.lines} when its head was noted"
        )
    return head


def _chain(db: sqlite3.Connection) -> Iterator[tuple[AuditLine, bytes]]:
    for *row, digest in db.execute(f"SELECT {_COLUMNS}, digest FROM lines ORDER BY number"):  # noqa: S608 - constants
        yield _line(row), digest


def _line(row: list[object] | tuple[object, ...]) -> AuditLine:
    number, at, tenant, token, task, verb, outcome, detail = row
    return AuditLine(
        number=number,  # type: ignore[arg-type]
        at=at,  # type: ignore[arg-type]
        tenant=str(tenant),
        token=str(token),
        task=str(task),
        verb=str(verb),
        outcome=outcome,  # type: ignore[arg-type]
        detail=str(detail),
    )


def _head(db: sqlite3.Connection) -> AuditHead:
    row = db.execute("SELECT number, digest FROM lines ORDER BY number DESC LIMIT 1").fetchone()
    return AuditHead(0, _BEGINNING) if row is None else AuditHead(*row)


def _digest(before: bytes, line: AuditLine) -> bytes:
    return hashlib.sha256(before + json.dumps(_values(line), separators=(",", ":")).encode()).digest()


def _clean(text: str, longest: int) -> str:
    """Printable, on one line, and not too long."""
    printable = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()
    return printable if len(printable) <= longest else printable[: longest - 1] + "…"
