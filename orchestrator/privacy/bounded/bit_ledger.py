"""The ledger of bits: what every tenant was told through every task, and how much more it may be.

    charge     before features are released: on the disk, or refused as a whole if the limit would be passed

With keyed noise a feature that was released once is free for ever: the same bytes tell nothing new. The ledger
recognises it by a keyed digest (`keyed_noise.release_digests`), so the file identifies no image. With fresh noise every
release counts. A new version is a new release of every image, charged beside the old one.

Bits of one tenant's tasks add up, and so do those of tenants who put theirs together: the limit is for one pair of
them. What is counted is the channel's bound, whatever the image; a release that was charged and then failed stays
charged.

One SQLite file in WAL mode, which many processes and threads of one machine may use at once, on a local disk. Counts
are whole numbers of releases; bits are made of them when asked for, so nothing drifts however long the ledger is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.errors import BitBudgetExceededError, ConfigError, LedgerError
from orchestrator.privacy.ledger_file import SharedLedgerFile

RELEASE_DIGEST_BYTES: Final = 16
"""Two different releases have equal digests with a probability of 2^-128."""
_ROUNDING: Final = 1e-12
"""Relative: three times 9.3 bits must fit into a limit of 27.9."""

_SCHEMA: Final = (
    """CREATE TABLE limits (
        tenant TEXT NOT NULL,
        task TEXT NOT NULL,
        bits REAL NOT NULL CHECK (bits >= 0),
        PRIMARY KEY (tenant, task)
    ) STRICT""",
    """CREATE TABLE spending (
        id INTEGER PRIMARY KEY,
        tenant TEXT NOT NULL,
        task TEXT NOT NULL,
        version TEXT NOT NULL,
        fresh INTEGER NOT NULL CHECK (fresh IN (0, 1)),
        bits_per_release REAL NOT NULL CHECK (bits_per_release > 0),
        releases INTEGER NOT NULL DEFAULT 0 CHECK (releases >= 0),
        UNIQUE (tenant, task, version, fresh)
    ) STRICT""",
    """CREATE TABLE released (
        spending INTEGER NOT NULL REFERENCES spending,
        digest BLOB NOT NULL,
        PRIMARY KEY (spending, digest)
    ) STRICT, WITHOUT ROWID""",
    # Counts only ever grow, and what they are for never changes, whoever writes to the file. A digest that was taken
    # out is charged again, which is safe.
    """CREATE TRIGGER spending_grows BEFORE UPDATE ON spending
    WHEN NEW.releases < OLD.releases OR NEW.tenant IS NOT OLD.tenant OR NEW.task IS NOT OLD.task
      OR NEW.version IS NOT OLD.version OR NEW.fresh IS NOT OLD.fresh
      OR NEW.bits_per_release IS NOT OLD.bits_per_release
    BEGIN SELECT RAISE(ABORT, 'what was released cannot be taken back'); END""",
    """CREATE TRIGGER spending_stays BEFORE DELETE ON spending
    BEGIN SELECT RAISE(ABORT, 'what was released cannot be taken back'); END""",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """Releases of one version of a task to one tenant."""

    version: str
    fresh: bool
    """Whether each release had noise of its own."""
    bits_per_release: float
    releases: int
    """That counted. Keyed: so many images."""

    @property
    def bits(self) -> float:
        """Of all of them."""
        return self.releases * self.bits_per_release


@dataclass(frozen=True, kw_only=True, slots=True)
class BitAccount:
    """Everything about one tenant and one task."""

    tenant: str
    task: str
    limit_bits: float | None
    """Infinite: bits are counted only. None: none was set, so nothing may be released."""
    spending: tuple[Spending, ...]

    @property
    def spent_bits(self) -> float:
        """Released so far."""
        return math.fsum(part.bits for part in self.spending)

    @property
    def left_bits(self) -> float:
        """What may still be released; 0 where the limit was lowered below what is spent."""
        return max(0.0, (self.limit_bits or 0.0) - self.spent_bits)

    def has_room_for(self, bits: float) -> bool:
        """Whether so many bits more do not pass the limit."""
        total = math.fsum((self.spent_bits, bits))
        return self.limit_bits is not None and total <= self.limit_bits * (1 + _ROUNDING)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary. ``limit_bits`` is null where none was set, "none" where bits are only counted."""
        counting = self.limit_bits is not None and math.isinf(self.limit_bits)
        return {
            "tenant": self.tenant,
            "task": self.task,
            "limit_bits": "none" if counting else self.limit_bits,
            "bits_spent": self.spent_bits,
            "bits_left": None if counting else self.left_bits,
            "versions": [
                {
                    "version": part.version,
                    "noise": "fresh" if part.fresh else "keyed",
                    "bits_per_release": part.bits_per_release,
                    "releases": part.releases,
                }
                for part in self.spending
            ],
        }


class BitLedger(SharedLedgerFile):
    """The bits of all tenants of one producer. A context manager; many threads and processes may use the file."""

    WHAT = "ledger of bits"
    APPLICATION_ID = 0x4D4D4249
    VERSION = 1
    SCHEMA = _SCHEMA

    def set_limit(self, tenant: str, task: str, bits: float) -> BitAccount:
        """What this tenant may be told through this task in all; infinite only counts.

        It may be below what is spent: then nothing is left, and what was released before stays free with keyed noise.
        """
        if not bits >= 0:
            raise ConfigError(f"a limit of bits must be >= 0, got {bits}")
        with self._transaction() as db:
            db.execute(
                "INSERT INTO limits VALUES (?, ?, ?) ON CONFLICT (tenant, task) DO UPDATE SET bits = excluded.bits",
                (tenant, task, float(bits)),
            )
            return self._account(tenant, task)

    def charge(
        self,
        tenant: str,
        task: str,
        version: str,
        digests: Sequence[bytes],
        bits_per_release: float,
        *,
        fresh: bool,
    ) -> float:
        """Charge features that are about to be released, one a digest, on the disk before it returns the bits.

        Keyed noise: digests that were charged before, or occur twice, are free. Fresh noise: every one counts. Without
        a limit nothing but free releases passes. Raises `BitBudgetExceededError` if the limit would be passed, and
        `LedgerError` if it cannot be written or this version had another number of bits; then nothing is charged, and
        nothing may be released.
        """
        _check_charge(digests, bits_per_release)
        if not digests or (not fresh and self._all_released(tenant, task, version, digests, bits_per_release)):
            return 0.0
        with self._transaction() as db:
            # Before anything is added: what is asked for is measured against this.
            account = self._account(tenant, task)
            spending = self._spending(tenant, task, version, bits_per_release, fresh=fresh)
            if fresh:
                counted = len(digests)
            else:
                rows = [(spending, digest) for digest in digests]
                counted = db.executemany("INSERT OR IGNORE INTO released VALUES (?, ?)", rows).rowcount
            bits = counted * bits_per_release
            if counted and not account.has_room_for(bits):
                raise BitBudgetExceededError(tenant, task, bits, account.left_bits, account.limit_bits)
            db.execute("UPDATE spending SET releases = releases + ? WHERE id = ?", (counted, spending))
        return bits

    def check_room(self, tenant: str, task: str, version: str, releases: int, bits_per_release: float) -> None:
        """Whether so many releases of that version would fit, those that were charged already among them.

        For what is to be given in many parts, of which the first is worth nothing without the last. Nothing is charged
        or kept free. Raises `BitBudgetExceededError`.
        """
        account = self.account(tenant, task)
        known = sum(part.releases for part in account.spending if part.version == version)
        bits = max(0, releases - known) * bits_per_release
        if bits and not account.has_room_for(bits):
            raise BitBudgetExceededError(tenant, task, bits, account.left_bits, account.limit_bits)

    def spent(self, tenant: str, task: str) -> float:
        """Bits released so far; 0 for a pair that the ledger does not know."""
        return self.account(tenant, task).spent_bits

    def account(self, tenant: str, task: str) -> BitAccount:
        """Everything about one pair, known or not."""
        with self._reading():
            return self._account(tenant, task)

    def summary(self) -> list[BitAccount]:
        """Of every pair that has a limit or was given something, by name."""
        with self._reading() as db:
            pairs = db.execute(
                "SELECT tenant, task FROM limits UNION SELECT tenant, task FROM spending ORDER BY tenant, task"
            ).fetchall()
            return [self._account(tenant, task) for tenant, task in pairs]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _all_released(self, tenant: str, task: str, version: str, digests: Sequence[bytes], bits: float) -> bool:
        """Whether nothing is new: what is free for ever need not wait for the disk."""
        key = (tenant, task, version, bits)
        with self._reading() as db:
            found = db.execute(
                "SELECT id FROM spending WHERE tenant = ? AND task = ? AND version = ? AND bits_per_release = ? "
                "AND fresh = 0",
                key,
            ).fetchone()
            known = "SELECT 1 FROM released WHERE spending = ? AND digest = ?"
            return found is not None and all(db.execute(known, (found[0], digest)).fetchone() for digest in digests)

    def _spending(self, tenant: str, task: str, version: str, bits: float, *, fresh: bool) -> int:
        """The row of that version, begun if there is none."""
        key = (tenant, task, version, int(fresh))
        self._db.execute(
            "INSERT OR IGNORE INTO spending (tenant, task, version, fresh, bits_per_release) VALUES (?, ?, ?, ?, ?)",
            (*key, bits),
        )
        number, known = self._db.execute(
            "SELECT id, bits_per_release FROM spending WHERE tenant = ? AND task = ? AND version = ? AND fresh = ?", key
        ).fetchone()
        if known != bits:
            raise LedgerError(
                f"version {version} of task {task!r} was charged at {known:g} bits a release, and is now to be at "
                f"{bits:g}; nothing was charged. A version's channel never changes: publish another version"
            )
        return int(number)

    def _account(self, tenant: str, task: str) -> BitAccount:
        limit = self._db.execute("SELECT bits FROM limits WHERE tenant = ? AND task = ?", (tenant, task)).fetchone()
        rows = self._db.execute(
            "SELECT version, fresh, bits_per_release, releases FROM spending WHERE tenant = ? AND task = ? ORDER BY id",
            (tenant, task),
        )
        return BitAccount(
            tenant=tenant,
            task=task,
            limit_bits=None if limit is None else limit[0],
            spending=tuple(
                Spending(version=version, fresh=bool(fresh), bits_per_release=bits, releases=releases)
                for version, fresh, bits, releases in rows
            ),
        )


def _check_charge(digests: Sequence[bytes], bits_per_release: float) -> None:
    if not (math.isfinite(bits_per_release) and bits_per_release > 0):
        raise ConfigError(f"the bits of a release must be a finite number > 0, got {bits_per_release}")
    for digest in digests:
        if len(digest) != RELEASE_DIGEST_BYTES:
            raise ConfigError(f"a release is known by {RELEASE_DIGEST_BYTES} bytes, got {len(digest)}")
