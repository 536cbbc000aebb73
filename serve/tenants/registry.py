"""The registry: who there is, their tokens, what they were granted, and how much of it they used.

One SQLite file in WAL mode on a local disk, for all processes of a node. What is read is always what was last written,
by whichever process, so a token that is revoked is refused from the next request on.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.privacy.ledger_file import SharedLedgerFile
from serve.tenants.records import (
    NAME,
    ROLES,
    VERBS,
    VERBS_OF_ROLE,
    Grant,
    Role,
    Standing,
    TenantRecord,
    TokenRecord,
    Verb,
)
from serve.tenants.tokens import Token

_SCHEMA: Final = (
    """CREATE TABLE tenants (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        role TEXT NOT NULL CHECK (role IN ('tenant', 'device', 'operator')),
        created REAL NOT NULL,
        requests_per_minute INTEGER CHECK (requests_per_minute > 0)
    ) STRICT""",
    """CREATE TABLE tokens (
        id TEXT PRIMARY KEY,
        tenant INTEGER NOT NULL REFERENCES tenants,
        digest BLOB NOT NULL CHECK (length(digest) = 32),
        created REAL NOT NULL,
        expires REAL,
        revoked REAL
    ) STRICT""",
    """CREATE TABLE grants (
        tenant INTEGER NOT NULL REFERENCES tenants,
        task TEXT NOT NULL,
        verb TEXT NOT NULL CHECK (verb IN ('publish', 'read', 'metadata', 'train')),
        PRIMARY KEY (tenant, task, verb)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE usage (
        tenant INTEGER NOT NULL REFERENCES tenants,
        task TEXT NOT NULL,
        features INTEGER NOT NULL DEFAULT 0 CHECK (features >= 0),
        features_limit INTEGER CHECK (features_limit >= 0),
        PRIMARY KEY (tenant, task)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX tokens_of_tenant ON tokens (tenant)",
    # Whoever writes to the file: what was used stays used, what was revoked stays revoked, nobody becomes another.
    """CREATE TRIGGER usage_grows BEFORE UPDATE ON usage
    WHEN NEW.features < OLD.features OR NEW.tenant IS NOT OLD.tenant OR NEW.task IS NOT OLD.task
    BEGIN SELECT RAISE(ABORT, 'what was released cannot be taken back'); END""",
    """CREATE TRIGGER usage_stays BEFORE DELETE ON usage
    BEGIN SELECT RAISE(ABORT, 'what was released cannot be taken back'); END""",
    """CREATE TRIGGER tokens_end BEFORE UPDATE ON tokens
    WHEN NEW.digest IS NOT OLD.digest OR NEW.tenant IS NOT OLD.tenant OR NEW.id IS NOT OLD.id
      OR (OLD.revoked IS NOT NULL AND NEW.revoked IS NOT OLD.revoked)
      OR (OLD.expires IS NOT NULL AND (NEW.expires IS NULL OR NEW.expires > OLD.expires))
    BEGIN SELECT RAISE(ABORT, 'a token only ever ends sooner'); END""",
    """CREATE TRIGGER tokens_stay BEFORE DELETE ON tokens
    BEGIN SELECT RAISE(ABORT, 'what was issued stays known'); END""",
    """CREATE TRIGGER tenants_stay BEFORE DELETE ON tenants
    BEGIN SELECT RAISE(ABORT, 'a tenant stays known: revoke its tokens'); END""",
    """CREATE TRIGGER tenants_are_themselves BEFORE UPDATE ON tenants
    WHEN NEW.id IS NOT OLD.id OR NEW.name IS NOT OLD.name OR NEW.role IS NOT OLD.role
    BEGIN SELECT RAISE(ABORT, 'a tenant keeps its name and its role'); END""",
)

_STANDING: Final = """
SELECT k.id, k.created, k.expires, k.revoked, k.digest, t.id, t.name, t.role, t.requests_per_minute,
       g.verb IS NOT NULL, coalesce(u.features, 0), u.features_limit
FROM tokens k JOIN tenants t ON t.id = k.tenant
LEFT JOIN grants g ON g.tenant = t.id AND g.task = ? AND g.verb = ?
LEFT JOIN usage u ON u.tenant = t.id AND u.task = ?
WHERE k.id = ?
"""


@dataclass(frozen=True, slots=True)
class Issued:
    """A token that was just made. The only moment at which it is known in clear."""

    token: Token = field(repr=False)
    expires: float | None


class Registry(SharedLedgerFile):
    """Tenants, devices and operators. A context manager; many threads and processes may use the file.

    Every method that takes a name raises `UnknownNameError` if nobody has it.
    """

    WHAT = "registry of tenants"
    APPLICATION_ID = 0x4D4D5447
    VERSION = 1
    SCHEMA = _SCHEMA

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open it, or begin a new one. Raises `LedgerError` for a file that is something else, or damaged."""
        super().__init__(path)
        self._clock = clock

    # -- who there is --------------------------------------------------------------------------------------------------

    def add(
        self, name: str, role: Role, *, expires: float | None = None, requests_per_minute: int | None = None
    ) -> Issued:
        """Somebody new, with a first token. Raises `ConfigError` for a name that is malformed or taken."""
        check_name("name", name)
        _check_role(role)
        _check_rate(requests_per_minute)
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone():
                raise ConfigError(f"there is a {name!r} already: choose another name, or grant it more")
            number = db.execute(
                "INSERT INTO tenants (name, role, created, requests_per_minute) VALUES (?, ?, ?, ?)",
                (name, role, self._clock(), requests_per_minute),
            ).lastrowid
            return self._issue(int(number or 0), expires)

    def set_rate(self, name: str, requests_per_minute: int | None) -> None:
        """How many requests a minute are answered, over all tokens and tasks; None: any number."""
        _check_rate(requests_per_minute)
        with self._transaction() as db:
            number, _ = self._tenant(name)
            db.execute("UPDATE tenants SET requests_per_minute = ? WHERE id = ?", (requests_per_minute, number))

    def tenants(self) -> list[TenantRecord]:
        """Everybody, by name."""
        with self._reading() as db:
            names = [name for (name,) in db.execute("SELECT name FROM tenants ORDER BY name")]
            return [self._record(name) for name in names]

    def tenant(self, name: str) -> TenantRecord:
        """One of them."""
        with self._reading():
            return self._record(name)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def rotate(self, name: str, *, grace_s: float = 0.0, expires: float | None = None) -> Issued:
        """A new token. Those before it are accepted for ``grace_s`` seconds more, and no longer than they would be."""
        if not grace_s >= 0:
            raise ConfigError(f"the time of grace must be >= 0 seconds, got {grace_s}")
        with self._transaction() as db:
            number, _ = self._tenant(name)
            ends = self._clock() + grace_s
            db.execute(
                "UPDATE tokens SET expires = ? WHERE tenant = ? AND (expires IS NULL OR expires > ?)",
                (ends, number, ends),
            )
            return self._issue(number, expires)

    def revoke(self, name: str, token: str | None = None) -> int:
        """End one token, by its id, or all of them, at once and for good. Returns how many were ended."""
        with self._transaction() as db:
            number, _ = self._tenant(name)
            known = [key for (key,) in db.execute("SELECT id FROM tokens WHERE tenant = ?", (number,))]
            if token is not None and token not in known:
                raise UnknownNameError(f"token of {name!r}", token, known)
            return db.execute(
                "UPDATE tokens SET revoked = ? WHERE tenant = ? AND revoked IS NULL AND id = coalesce(?, id)",
                (self._clock(), number, token),
            ).rowcount

    # -- grants --------------------------------------------------------------------------------------------------------

    def grant(self, name: str, task: str, verbs: Sequence[Verb] | None = None) -> None:
        """Allow verbs of a task, in addition to what was allowed before; None: all that the role may have.

        The task need not be there yet. Raises `ConfigError` for a verb that is not for the role.
        """
        check_name("task", task)
        with self._transaction() as db:
            number, role = self._tenant(name)
            allowed = VERBS_OF_ROLE[role] - {"operate"}
            chosen = frozenset(allowed if verbs is None else verbs)
            if unknown := chosen - set(VERBS):
                raise UnknownNameError("verb", sorted(unknown)[0], VERBS)
            if not allowed:
                raise ConfigError(f"{name!r} is an {role}, which may operate every task and is granted nothing")
            if not chosen or chosen - allowed:
                raise ConfigError(
                    f"{name!r} is a {role}: it may be granted {', '.join(sorted(allowed))}, "
                    f"not {', '.join(sorted(chosen - allowed)) or 'nothing'}"
                )
            rows = [(number, task, verb) for verb in sorted(chosen)]
            db.executemany("INSERT OR IGNORE INTO grants VALUES (?, ?, ?)", rows)
            db.execute("INSERT OR IGNORE INTO usage (tenant, task) VALUES (?, ?)", (number, task))

    def take_back(self, name: str, task: str) -> None:
        """End every grant of a task, at once. What was used of it stays known, and counts if it is granted again."""
        with self._transaction() as db:
            number, _ = self._tenant(name)
            self._check_granted(number, name, task)
            db.execute("DELETE FROM grants WHERE tenant = ? AND task = ?", (number, task))

    def set_features(self, name: str, task: str, limit: int | None) -> None:
        """How many features of a task may be released in all; None: any number. It may be below what was released."""
        if limit is not None and limit < 0:
            raise ConfigError(f"a quota of features must be >= 0, got {limit}")
        with self._transaction() as db:
            number, _ = self._tenant(name)
            self._check_granted(number, name, task)
            db.execute("UPDATE usage SET features_limit = ? WHERE tenant = ? AND task = ?", (limit, number, task))

    # -- for every request ---------------------------------------------------------------------------------------------

    def standing(self, token: str, task: str, verb: str) -> Standing | None:
        """Of one token and what it asks for; None if there is no such token."""
        with self._reading_once() as db:
            return standing(db, token, task, verb)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _issue(self, tenant: int, expires: float | None) -> Issued:
        now = self._clock()
        if expires is not None and not expires > now:
            raise ConfigError("a token must expire in the future")
        token = Token.generate()
        self._db.execute(
            "INSERT INTO tokens (id, tenant, digest, created, expires) VALUES (?, ?, ?, ?, ?)",
            (token.id, tenant, token.digest, now, expires),
        )
        return Issued(token, expires)

    def _tenant(self, name: str) -> tuple[int, Role]:
        found = self._db.execute("SELECT id, role FROM tenants WHERE name = ?", (name,)).fetchone()
        if found is None:
            known = [name for (name,) in self._db.execute("SELECT name FROM tenants")]
            raise UnknownNameError("tenant, device or operator", name, known)
        return int(found[0]), found[1]

    def _check_granted(self, number: int, name: str, task: str) -> None:
        rows = self._db.execute("SELECT DISTINCT task FROM grants WHERE tenant = ?", (number,))
        if task not in (granted := [row[0] for row in rows]):
            raise UnknownNameError(f"task granted to {name!r}", task, granted)

    def _record(self, name: str) -> TenantRecord:
        number, role = self._tenant(name)
        db = self._db
        created, rate = db.execute(
            "SELECT created, requests_per_minute FROM tenants WHERE id = ?", (number,)
        ).fetchone()
        tokens = db.execute(
            "SELECT id, created, expires, revoked FROM tokens WHERE tenant = ? ORDER BY created, rowid", (number,)
        )
        verbs: dict[str, set[Verb]] = {}
        for task, verb in db.execute("SELECT task, verb FROM grants WHERE tenant = ?", (number,)):
            verbs.setdefault(task, set()).add(verb)
        usage = db.execute("SELECT task, features, features_limit FROM usage WHERE tenant = ? ORDER BY task", (number,))
        return TenantRecord(
            id=number,
            name=name,
            role=role,
            created=created,
            requests_per_minute=rate,
            tokens=tuple(TokenRecord(id=i, created=c, expires=e, revoked=r) for i, c, e, r in tokens),
            grants=tuple(
                Grant(task=task, verbs=frozenset(verbs.get(task, ())), features=features, features_limit=limit)
                for task, features, limit in usage
            ),
        )


def standing(db: sqlite3.Connection, token: str, task: str, verb: str) -> Standing | None:
    """What `Registry.standing` answers, within a transaction."""
    row = db.execute(_STANDING, (task, verb, task, token)).fetchone()
    if row is None:
        return None
    key, created, expires, revoked, digest, number, name, role, rate, granted, features, limit = row
    return Standing(
        digest=digest,
        token=TokenRecord(id=key, created=created, expires=expires, revoked=revoked),
        tenant_id=number,
        tenant=name,
        role=role,
        requests_per_minute=rate,
        granted=bool(granted),
        features=features,
        features_limit=limit,
    )


def book_features(db: sqlite3.Connection, tenant: int, task: str, features: int) -> None:
    """Count features that are about to be released, within a transaction that saw that there is room."""
    db.execute(
        "INSERT INTO usage (tenant, task, features) VALUES (?, ?, ?) "
        "ON CONFLICT (tenant, task) DO UPDATE SET features = features + excluded.features",
        (tenant, task, features),
    )


def check_name(what: str, name: str) -> None:
    """Raises `ConfigError` for a malformed one."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r}: use at most 63 lower case letters, digits, '-' and '_', no '-' or '_' first"
        )


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise UnknownNameError("role", role, ROLES)


def _check_rate(requests_per_minute: int | None) -> None:
    if requests_per_minute is not None and requests_per_minute < 1:
        raise ConfigError(f"a quota of requests per minute must be at least 1, got {requests_per_minute}")
