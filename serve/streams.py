"""What was published of one task: a durable list of features that tenants read on from where they were.

One SQLite file a task, in WAL mode on a local disk, for any number of processes of one node. Features are only ever
added, with numbers that rise and never come again; the oldest go when the list is too old or too large. A process that
is killed loses nothing that `append` returned; of a power cut SQLite may lose the last moments, and nothing more.

Axes: N features, C channels, H and W.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError, LedgerError
from orchestrator.privacy.ledger_file import SharedLedgerFile

_SCHEMA: Final = (
    """CREATE TABLE features (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        time_ms INTEGER NOT NULL,
        version TEXT NOT NULL,
        image BLOB NOT NULL,
        shape TEXT NOT NULL,
        z BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX features_of_an_image ON features (version, image)",
    "CREATE INDEX features_by_age ON features (time_ms)",
    """CREATE TRIGGER features_stay BEFORE UPDATE ON features
    BEGIN SELECT RAISE(ABORT, 'what was published does not change'); END""",
    """CREATE TABLE versions (
        version TEXT PRIMARY KEY,
        bits REAL,
        noise_version TEXT,
        fresh INTEGER NOT NULL
    ) STRICT""",
)
_LATEST: Final = """SELECT sequence, time_ms, version, image, shape, z FROM features
    WHERE time_ms >= :oldest AND (:version IS NULL OR version = :version) ORDER BY sequence DESC LIMIT 1"""
_AFTER: Final = """SELECT sequence, time_ms, version, image, shape, z FROM features
    WHERE sequence > :after AND time_ms >= :oldest AND (:version IS NULL OR version = :version)
    ORDER BY sequence LIMIT :limit"""
_FIND: Final = """SELECT sequence, time_ms, version, image, shape, z FROM features
    WHERE version = :version AND image = :image ORDER BY sequence LIMIT 1"""
_BOUNDS: Final = """SELECT (SELECT min(sequence) FROM features),
    (SELECT seq FROM sqlite_sequence WHERE name = 'features')"""
_PRUNE_EVERY: Final = 64
"""Numbers between two looks at age and size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingLimits:
    """How much of a task's stream is kept."""

    max_age_s: float = 24 * 3600.0
    """A feature that is older is forgotten."""
    max_features: int = 100_000
    """The oldest are forgotten first."""
    max_bytes: int = 1 << 30
    """Of the features themselves, all taken to be as large as the newest."""

    def __post_init__(self) -> None:
        if not (self.max_age_s > 0 and self.max_features > 0 and self.max_bytes > 0):
            raise ConfigError("a stream keeps features for some time, and some of them: its limits must be > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class NewFeature:
    """One that is to be published."""

    version: str
    image: bytes = field(repr=False)
    """As of `StoredFeature`."""
    z: NDArray[np.float32] = field(repr=False)
    """(C, H, W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeature:
    """One feature of the stream."""

    sequence: int
    time_ms: int
    """Since 1970, UTC."""
    version: str
    image: bytes = field(repr=False)
    """`ImageDigests` of the image: the producer's secret, which never leaves the node."""
    z: NDArray[np.float32] = field(repr=False)
    """(C, H, W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionTerms:
    """What a tenant is charged for the features of one version, also when that version is not served any more."""

    version: str
    bits: float | None
    """Of one feature; None: it is not bounded, and costs none."""
    noise_version: str | None
    """Under which its noise was drawn, where it is bounded; see `orchestrator.release.published_version`."""
    fresh: bool = False
    """Whether each number of the stream has noise of its own, so that an image that comes again costs again."""


class FeatureStore(SharedLedgerFile):
    """The stream of one task. Many threads and processes may use the file."""

    WHAT = "feature stream"
    APPLICATION_ID = 0x4D4D4653
    VERSION = 1
    SCHEMA = _SCHEMA
    SYNCHRONOUS = "NORMAL"  # unlike a ledger's charge, a feature may be published again

    def __init__(
        self, path: Path, limits: RingLimits = RingLimits(), *, clock: Callable[[], float] = time.time
    ) -> None:
        """Open it, or begin a new one. Raises `LedgerError` for a file that is something else, or damaged."""
        self._limits, self._clock = limits, clock
        super().__init__(path)

    def append(self, new: Sequence[NewFeature]) -> list[StoredFeature]:
        """Add them all, or none. Raises `LedgerError` if they cannot be written."""
        now, stored = int(self._clock() * 1000), []
        rows = [
            (now, one.version, one.image, json.dumps(one.z.shape), np.ascontiguousarray(one.z, dtype="<f4").tobytes())
            for one in new
        ]
        with self._transaction() as db:
            for one, row in zip(new, rows, strict=True):
                done = db.execute("INSERT INTO features (time_ms, version, image, shape, z) VALUES (?,?,?,?,?)", row)
                number = int(done.lastrowid or 0)
                stored.append(
                    StoredFeature(sequence=number, time_ms=now, version=one.version, image=one.image, z=one.z)
                )
            if any(feature.sequence % _PRUNE_EVERY == 0 for feature in stored):
                self._prune(db, now, stored[-1].sequence, len(rows[-1][-1]))
        return stored

    def remember(self, terms: VersionTerms) -> None:
        """Note a version before its first feature. Raises `LedgerError` if it was known under other terms."""
        with self._transaction() as db:
            row = (terms.version, terms.bits, terms.noise_version, int(terms.fresh))
            db.execute("INSERT OR IGNORE INTO versions VALUES (?, ?, ?, ?)", row)
            if db.execute("SELECT * FROM versions WHERE version = ?", row[:1]).fetchone() != row:
                raise LedgerError(
                    f"version {terms.version} is in {self.path} under other terms: a version never changes"
                )

    def terms(self, version: str) -> VersionTerms:
        """Of a version that was remembered. Raises `LedgerError` for another."""
        with self._reading_once() as db:
            row = db.execute("SELECT * FROM versions WHERE version = ?", (version,)).fetchone()
        if row is None:
            raise LedgerError(f"version {version} is not in {self.path}")
        return VersionTerms(version=row[0], bits=row[1], noise_version=row[2], fresh=bool(row[3]))

    def knows(self, version: str) -> bool:
        """Whether that version was ever remembered."""
        with self._reading_once() as db:
            return db.execute("SELECT 1 FROM versions WHERE version = ?", (version,)).fetchone() is not None

    def latest(self, version: str | None = None) -> StoredFeature | None:
        """The newest, of that version if one is named."""
        found = self._read(_LATEST, version=version, oldest=self._oldest_ms())
        return found[0] if found else None

    def after(self, sequence: int, limit: int, version: str | None = None) -> list[StoredFeature]:
        """At most ``limit`` with higher numbers, in order, all of one version: it ends where the version changes."""
        found = self._read(_AFTER, after=sequence, limit=limit, version=version, oldest=self._oldest_ms())
        return list(itertools.takewhile(lambda feature: feature.version == found[0].version, found))

    def find(self, version: str, image: bytes) -> NDArray[np.float32] | None:
        """z of that image as it was first published, while it is kept."""
        found = self._read(_FIND, version=version, image=image)
        return found[0].z if found else None

    def bounds(self) -> tuple[int, int]:
        """(lowest number that is kept, highest number ever given); (1, 0) of a stream that has not begun."""
        with self._reading_once() as db:
            lowest, given = db.execute(_BOUNDS).fetchone()
        highest = int(given or 0)
        return highest + 1 if lowest is None else int(lowest), highest

    # -- inside --------------------------------------------------------------------------------------------------------

    def _oldest_ms(self) -> int:
        return int((self._clock() - self._limits.max_age_s) * 1000)

    def _read(self, statement: str, **values: object) -> list[StoredFeature]:
        with self._reading_once() as db:
            rows = db.execute(statement, values).fetchall()
        return [_feature(*row) for row in rows]

    def _prune(self, db: sqlite3.Connection, now_ms: int, newest: int, size_bytes: int) -> None:
        kept = max(1, min(self._limits.max_features, self._limits.max_bytes // max(1, size_bytes)))
        db.execute("DELETE FROM features WHERE sequence <= ?", (newest - kept,))
        db.execute("DELETE FROM features WHERE time_ms < ?", (now_ms - int(self._limits.max_age_s * 1000),))


def _feature(sequence: int, time_ms: int, version: str, image: bytes, shape: str, z: bytes) -> StoredFeature:
    try:
        values = np.frombuffer(z, dtype="<f4").reshape(json.loads(shape))
    except ValueError as error:
        raise LedgerError(f"feature {sequence} of the stream is damaged") from error
    return StoredFeature(sequence=sequence, time_ms=time_ms, version=version, image=image, z=values)
