"""The privacy ledger: what has ever been spent on the images of a data set, and what may still be.

    reserve    before the first step: refused if all that was ever spent, all that others have reserved and this
               training together would pass the data set's limit
    charge     before every step: written to the disk, or the step is not taken
    release    at the end: what was reserved and not charged is free again. What was charged stays for ever

A reservation belongs to one secret, the seed of its noise and of its batches. A training that is interrupted and
resumed with the same secret takes the same steps again, which release nothing new, so a step that is charged already is
free. Without the secret the steps would be others, and need a reservation of their own.

The ledger of a data set is known by the fingerprint of its images: a copy under another name has the same one. All of
them are in one SQLite file in WAL mode, which many processes of one machine may use at once. It must be on a local
disk: WAL does not work over a network.

All mechanisms are Gaussian noise on the clipped sum of a Poisson sample, neighbours differ by one added or removed
image, and composition is by Renyi DP.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import BudgetExceededError, ConfigError, LedgerError, UnknownNameError
from orchestrator.privacy.accounting import History, composed_epsilon, rounded_up
from orchestrator.privacy.ledger_file import LedgerFile

# Charges only ever grow, and what a reservation is for never changes, whoever writes to the file.
_SCRIPT: Final = """
CREATE TABLE datasets (
    fingerprint TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    limit_epsilon REAL CHECK (limit_epsilon > 0),
    limit_delta REAL CHECK (limit_delta > 0 AND limit_delta < 1)
) STRICT;
CREATE TABLE reservations (
    id INTEGER PRIMARY KEY,
    dataset TEXT NOT NULL REFERENCES datasets,
    run TEXT NOT NULL,
    part TEXT NOT NULL,
    mode TEXT NOT NULL,
    secret TEXT NOT NULL,
    noise_multiplier REAL NOT NULL CHECK (noise_multiplier >= 0),
    sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
    delta REAL NOT NULL CHECK (delta > 0 AND delta < 1),
    steps INTEGER NOT NULL CHECK (steps > 0),
    charged INTEGER NOT NULL DEFAULT 0 CHECK (charged >= 0 AND charged <= steps),
    released INTEGER NOT NULL DEFAULT 0,
    created TEXT NOT NULL,
    UNIQUE (dataset, run, part, secret)
) STRICT;
CREATE TABLE outside (
    dataset TEXT NOT NULL REFERENCES datasets,
    run TEXT NOT NULL,
    what TEXT NOT NULL,
    created TEXT NOT NULL,
    UNIQUE (dataset, run, what)
) STRICT;
CREATE TRIGGER charges_stay BEFORE UPDATE ON reservations
WHEN NEW.charged < OLD.charged OR NEW.released < OLD.released OR NEW.dataset IS NOT OLD.dataset
  OR NEW.noise_multiplier IS NOT OLD.noise_multiplier OR NEW.sample_rate IS NOT OLD.sample_rate
  OR NEW.steps IS NOT OLD.steps OR NEW.secret IS NOT OLD.secret
BEGIN SELECT RAISE(ABORT, 'what was spent cannot be taken back'); END;
CREATE TRIGGER reservations_stay BEFORE DELETE ON reservations
BEGIN SELECT RAISE(ABORT, 'what was spent cannot be taken back'); END;
"""


def _statements(script: str) -> Iterator[str]:
    """The statements of a script: a trigger has a semicolon inside."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


_SCHEMA: Final = tuple(_statements(_SCRIPT))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """So many steps of Gaussian noise on the clipped sum of a Poisson sample."""

    noise_multiplier: float
    """Standard deviation of the noise over the clipping norm."""
    sample_rate: float
    """Probability with which each image enters a batch."""
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One reservation."""

    id: int
    run: str
    part: str
    """Which training of the run."""
    mode: str
    """What the training guarantees, by its name in `orchestrator.privacy.guarantee`."""
    mechanism: Mechanism
    """All that was reserved."""
    delta: float
    charged: int
    """Steps that were taken."""
    released: bool
    """Whether what was not charged is free again."""
    created: str

    @property
    def held(self) -> int:
        """Steps that count: those taken, and those that may still be."""
        return self.charged if self.released else self.mechanism.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Everything about one data set."""

    fingerprint: str
    name: str
    limit: tuple[float, float] | None
    """(epsilon, delta) that may not be passed; None: no limit."""
    entries: tuple[Entry, ...]
    outside: tuple[tuple[str, str, str], ...]
    """(when, run, what) was done with the images and no accountant covers."""

    @property
    def delta(self) -> float | None:
        """At which epsilon is given: the limit's, or the smallest that any training asked for."""
        if self.limit is not None:
            return self.limit[1]
        return min((entry.delta for entry in self.entries), default=None)

    def spent(self, delta: float) -> float:
        """Epsilon of all steps that were taken."""
        return composed_epsilon(_history(self.entries, held=False), delta)

    def committed(self, delta: float) -> float:
        """Epsilon of all steps that were taken or may still be."""
        return composed_epsilon(_history(self.entries, held=True), delta)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        delta = self.delta
        return {
            "images": self.fingerprint,
            "name": self.name,
            "unit": "image, added or removed",
            "composition": "Renyi DP over all mechanisms",
            "limit": None if self.limit is None else {"epsilon": self.limit[0], "delta": self.limit[1]},
            "delta": delta,
            "epsilon_spent": None if delta is None else self.spent(delta),
            "epsilon_committed": None if delta is None else self.committed(delta),
            "reservations": [
                {
                    "id": e.id,
                    "created": e.created,
                    "run": e.run,
                    "part": e.part,
                    "mode": e.mode,
                    "noise_multiplier": e.mechanism.noise_multiplier,
                    "sample_rate": e.mechanism.sample_rate,
                    "steps_reserved": e.mechanism.steps,
                    "steps_charged": e.charged,
                    "released": e.released,
                }
                for e in self.entries
            ],
            "outside_the_accounting": [{"created": at, "run": run, "what": what} for at, run, what in self.outside],
        }


class Ledger(LedgerFile):
    """The ledgers of all data sets of one producer. A context manager; any number of processes may have it open."""

    WHAT = "privacy ledger"
    APPLICATION_ID = 0x4D4D4C47
    VERSION = 1
    SCHEMA = _SCHEMA

    # -- the budget ----------------------------------------------------------------------------------------------------

    def set_limit(self, fingerprint: str, name: str, *, epsilon: float, delta: float) -> Account:
        """What all trainings on these images together may cost. May be below what is spent: then nothing is left."""
        if not epsilon > 0 or not 0 < delta < 1:
            raise ConfigError(f"a limit needs epsilon > 0 and 0 < delta < 1, got {epsilon} and {delta}")
        with self._transaction() as db:
            self._add_dataset(fingerprint, name)
            db.execute(
                "UPDATE datasets SET limit_epsilon = ?, limit_delta = ? WHERE fingerprint = ?",
                (epsilon, delta, fingerprint),
            )
            return self._account(fingerprint)

    def reserve(
        self,
        fingerprint: str,
        name: str,
        mechanism: Mechanism,
        *,
        run: str,
        part: str,
        mode: str,
        delta: float,
        secret: int,
    ) -> int:
        """Set the budget of a training aside before its first step. Returns the reservation's number.

        Asked again by the same part of the same run, with the same secret, it is the same reservation. Raises
        `BudgetExceededError` if the limit would be passed; then nothing is reserved.
        """
        with self._transaction() as db:
            self._add_dataset(fingerprint, name)
            account = self._account(fingerprint)
            key = (fingerprint, run, part, _fingerprint_of(secret))
            found = db.execute(
                "SELECT id, noise_multiplier, sample_rate, steps, charged, released FROM reservations "
                "WHERE dataset = ? AND run = ? AND part = ? AND secret = ?",
                key,
            ).fetchone()
            if found is not None:
                return _same(found, mechanism, part)
            _check_limit(account, mechanism, part)
            cursor = db.execute(
                "INSERT INTO reservations (dataset, run, part, secret, mode, noise_multiplier, sample_rate, delta, "
                "steps, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    mode,
                    mechanism.noise_multiplier,
                    mechanism.sample_rate,
                    delta,
                    mechanism.steps,
                    _now(),
                ),
            )
            return int(cursor.lastrowid or 0)

    def charge(self, reservation: int, step: int) -> None:
        """Write down that step ``step`` (from 1) is about to be taken, on the disk before this returns.

        A step up to the last one charged is free: whoever holds the reservation does the same step again. Raises
        `LedgerError` if it cannot be written, was not reserved, or the reservation was released.
        """
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE reservations SET charged = ? WHERE id = ? AND charged < ? AND steps >= ? AND released = 0",
                (step, reservation, step, step),
            ).rowcount
            if changed:
                return
            found = db.execute("SELECT charged, steps, released FROM reservations WHERE id = ?", (reservation,))
            charged, steps, released = found.fetchone() or (None, None, None)
        if charged is None:
            raise LedgerError(f"{self.path} has no reservation {reservation}: the step is not taken")
        if step <= charged:
            return
        if released:
            raise LedgerError(
                f"reservation {reservation} was released after {charged} steps: step {step} is not taken. "
                "Start the training anew"
            )
        raise LedgerError(f"step {step} was not reserved: reservation {reservation} is for {steps} steps")

    def release(self, reservation: int) -> None:
        """Give back what was reserved and not charged. What was charged stays."""
        with self._transaction() as db:
            if not db.execute("UPDATE reservations SET released = 1 WHERE id = ?", (reservation,)).rowcount:
                raise UnknownNameError("reservation", str(reservation), [str(n) for (n,) in self._ids()])

    def note_outside(self, fingerprint: str, name: str, *, run: str, what: str) -> None:
        """Note something that was done with the images and that no accountant covers. The same note is kept once."""
        with self._transaction() as db:
            self._add_dataset(fingerprint, name)
            db.execute("INSERT OR IGNORE INTO outside VALUES (?, ?, ?, ?)", (fingerprint, run, what, _now()))

    # -- reading -------------------------------------------------------------------------------------------------------

    def accounts(self) -> list[Account]:
        """Of every data set, by name."""
        with self._errors("read"):
            rows = self._db.execute("SELECT fingerprint FROM datasets ORDER BY name, fingerprint").fetchall()
            return [self._account(fingerprint) for (fingerprint,) in rows]

    def account(self, wanted: str) -> Account:
        """Of the data set with that name, or with a fingerprint that begins so."""
        accounts = self.accounts()
        found = [a for a in accounts if a.name == wanted or a.fingerprint.startswith(wanted)]
        if len(found) != 1:
            names = [f"{a.name} ({a.fingerprint[:12]})" for a in found or accounts]
            raise UnknownNameError("data set in the ledger", wanted, names)
        return found[0]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _add_dataset(self, fingerprint: str, name: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO datasets (fingerprint, name) VALUES (?, ?)", (fingerprint, name))

    def _ids(self) -> list[tuple[int]]:
        return self._db.execute("SELECT id FROM reservations ORDER BY id").fetchall()

    def _account(self, fingerprint: str) -> Account:
        db = self._db
        name, epsilon, delta = db.execute(
            "SELECT name, limit_epsilon, limit_delta FROM datasets WHERE fingerprint = ?", (fingerprint,)
        ).fetchone()
        entries = db.execute(
            "SELECT id, run, part, mode, noise_multiplier, sample_rate, steps, delta, charged, released, created "
            "FROM reservations WHERE dataset = ? ORDER BY id",
            (fingerprint,),
        )
        return Account(
            fingerprint=fingerprint,
            name=name,
            limit=None if epsilon is None else (epsilon, delta),
            entries=tuple(
                Entry(
                    id=number,
                    run=run,
                    part=part,
                    mode=mode,
                    mechanism=Mechanism(noise_multiplier=sigma, sample_rate=q, steps=steps),
                    delta=its_delta,
                    charged=charged,
                    released=bool(released),
                    created=created,
                )
                for number, run, part, mode, sigma, q, steps, its_delta, charged, released, created in entries
            ),
            outside=tuple(
                db.execute(
                    "SELECT created, run, what FROM outside WHERE dataset = ? ORDER BY created, rowid", (fingerprint,)
                )
            ),
        )


@dataclass(frozen=True)
class LedgerCharge:
    """What a private training calls before every step. Plain data: it travels to the process that trains."""

    path: Path
    reservation: int
    _open: list[Ledger] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, step: int) -> None:
        """Charge the step, or raise `LedgerError`."""
        if not self._open:
            self._open.append(Ledger(self.path))
        self._open[0].charge(self.reservation, step)

    def __reduce__(self) -> Any:
        return LedgerCharge, (self.path, self.reservation)


def _history(entries: tuple[Entry, ...], *, held: bool) -> History:
    return tuple(
        (e.mechanism.noise_multiplier, e.mechanism.sample_rate, e.held if held else e.charged)
        for e in entries
        if (e.held if held else e.charged)
    )


def _check_limit(account: Account, mechanism: Mechanism, part: str) -> None:
    if account.limit is None:
        return
    limit, delta = account.limit
    wanted = (mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps)
    total = composed_epsilon((*_history(account.entries, held=True), wanted), delta)
    if total <= limit:
        return
    spent, committed = rounded_up(account.spent(delta)), rounded_up(account.committed(delta))
    raise BudgetExceededError(
        f"the privacy budget of {account.name} ({account.fingerprint[:12]}) does not have room for {part}: {spent} of "
        f"epsilon {limit:g} is spent and {committed} with what is reserved; with this training it would be "
        f"{rounded_up(total)} (at delta {delta:g}, by RDP). Nothing was trained. Ask for a smaller --epsilon, release "
        "what interrupted runs hold (pipelines/ledger.py show), or raise the limit"
    )


def _same(found: tuple[Any, ...], mechanism: Mechanism, part: str) -> int:
    number, sigma, q, steps, charged, released = found
    if (sigma, q, steps) != (mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps):
        raise LedgerError(f"reservation {number} of {part} is for another training: start it anew, without --resume")
    if released and charged < steps:
        raise LedgerError(f"reservation {number} of {part} was released: start the training anew, without --resume")
    return int(number)  # a training that took all its steps may take them again: they release nothing new


def _fingerprint_of(secret: int) -> str:
    """By which a secret is recognised. A random secret cannot be found from this; a user's own seed may be guessed."""
    return hashlib.sha256(f"ledger {secret}".encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
