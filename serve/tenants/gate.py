"""The gate: every request of every route of every app comes through `Gate.admit`, and every release through
`Admission.charge`, or `Gate.charge_each` for what is published together.

    admit     is the token valid, may it do this, does it not ask too often. Reads the file, without a cache: a token
              that is revoked by any process of the node is refused from the next request on
    charge    before features are released: whether the token is still valid; then features and bits are booked
    audit     what was done with an admission. What the gate refuses is written down by itself

Outside, 401 is one answer to a token that is missing, malformed, unknown, expired or revoked, and 404 is one answer to
a task that does not exist and one that is somebody else's.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from orchestrator.errors import BitBudgetExceededError, ConfigError, LedgerError
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from serve.tenants.audit import AuditEntry, AuditLog
from serve.tenants.errors import NOT_AUTHENTICATED, NOT_FOUND, SPENT, TOO_MANY, Refused
from serve.tenants.rates import RateFile
from serve.tenants.records import NAME, VERBS_OF_ROLE, Role, Standing, Verb
from serve.tenants.registry import Registry, book_features, standing
from serve.tenants.tokens import Token

__all__ = ["EVERY_TASK", "Admission", "Denial", "Gate", "Places", "Refused", "Verb"]

EVERY_TASK: Final = "*"
"""For the verb ``operate``, where no one task is meant: a page of all of them."""
_LINES_PER_MINUTE: Final = 600
"""Of refusals of one tenant, and of all who are nobody: whoever asks in vain cannot fill the disk."""
_OK: Final = 200
_NOBODY: Final = 0
"""Tenants are numbered from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The files of one registry, beside one another on a local disk."""

    registry: Path

    @classmethod
    def in_storage(cls, storage: Path) -> Places:
        """Where they are unless somebody says otherwise."""
        return cls(registry=storage / "tenants" / "registry.db")

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.registry.with_name(f"{self.registry.stem}-audit.db")

    @property
    def bits(self) -> Path:
        """The ledger of bits."""
        return self.registry.with_name(f"{self.registry.stem}-bits.db")

    @property
    def rates(self) -> Path:
        """Request rates."""
        return self.registry.with_name(f"{self.registry.stem}.rates")

    @property
    def custody(self) -> Path:
        """The folder of the custodian of labels."""
        return self.registry.with_name(f"{self.registry.stem}-custody")

    @property
    def custody_key(self) -> Path:
        """Its key, unless it is kept elsewhere."""
        return self.registry.with_name(f"{self.registry.stem}-custody.key")


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A request that was let in: one verb of one task for one tenant. Not to be kept for another request."""

    tenant: str
    role: Role
    task: str
    verb: Verb
    token: str
    """The token's id, which is no secret."""
    _tenant_id: int = field(repr=False)
    _gate: Gate = field(repr=False)

    def charge(
        self,
        digests: Sequence[bytes],
        version: str,
        bits_per_release: float | None,
        fresh: bool,
        features: int,
    ) -> None:
        """Book ``features`` features that are about to be released, before this returns: whoever is killed, they count.

        Where the feature is bounded, ``bits_per_release`` are charged for each of ``digests``, which are
        `orchestrator.privacy.bounded.keyed_noise.release_digests`, synced to the disk; ``fresh`` says whether each has
        noise of its own.
        Raises `Refused`: 403 where features or bits are used up, 401 or 404 where token or grant ended meanwhile; then
        nothing may be released. What was booked and then not released stays booked.
        """
        self._gate._charge(self, digests, version, bits_per_release, fresh, features)

    def charge_training(
        self, digests: Sequence[bytes], version: str, bits_per_release: float, *, releases: int = 0
    ) -> None:
        """As `charge`, for bounded features of a training: bits alone. Equal digests are one feature.

        ``releases``: that there will be of this version in all; refused before the first if they do not fit. What is
        refused for want of bits has the `BitBudgetExceededError`, which is not for the tenant, as its cause.
        """
        self._gate._charge_training(self, digests, version, bits_per_release, releases)

    def recheck(self) -> None:
        """Whether it would still be let in, for a stream that stays open. Raises `Refused`; takes no request."""
        self._gate._recheck(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Denial:
    """A request that is not let in, which `Gate.write_down` has yet to be told of."""

    refusal: Refused
    task: str
    verb: str
    detail: str = ""
    _known: Standing | None = field(default=None, repr=False)


class _Bookings(Registry):
    """The registry as one who only counts features has it open.

    A count survives the process that made it; a power cut may take the last ones. Bits are on the disk in any case.
    """

    SYNCHRONOUS = "NORMAL"

    def booking(self) -> AbstractContextManager[sqlite3.Connection]:
        """What was read stays true until what follows from it is written."""
        return self._transaction()


class Gate:
    """Who may ask for what, for one process; many threads may use it, and many processes of one node the same files.

    Made where it is used: it travels between processes as its path.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the registry at ``path`` and the files beside it, or begin new ones. Raises `LedgerError`."""
        self.places = Places(registry=path.expanduser().absolute())
        self._clock = clock
        self._process = os.getpid()
        self._reader = Registry(self.places.registry, clock=clock)  # nobody who reads waits for the disk
        self._bookings = _Bookings(self.places.registry, clock=clock)
        self._bits = BitLedger(self.places.bits)
        self._audit = AuditLog(self.places.audit, clock=clock)
        self._rates = RateFile(self.places.rates, clock=monotonic)
        self._unwritten: dict[int, int] = {}

    def __reduce__(self) -> tuple[type[Gate], tuple[Path]]:
        return Gate, (self.places.registry,)

    def close(self) -> None:
        """Close the files."""
        for file in (self._reader, self._bookings, self._bits, self._audit, self._rates):
            file.close()

    def admit(self, authorization: str | None, *, task: str, verb: Verb, features: int = 0) -> Admission:
        """Let a request in, by its ``Authorization`` header, or raise `Refused`.

        ``features`` is how many features will be asked for, if that is known: refused at once where there is no room.
        Raises `LedgerError` if the registry cannot be read: then nobody may be let in.
        """
        decided = self.decide(authorization, task=task, verb=verb, features=features)
        if isinstance(decided, Denial):
            raise self.write_down(decided)
        return decided

    def decide(self, authorization: str | None, *, task: str, verb: Verb, features: int = 0) -> Admission | Denial:
        """As `admit`, for an event loop: it waits for no writer, and a denial is left to `write_down`."""
        if os.getpid() != self._process:
            raise LedgerError("this gate was made by another process: make one in each")
        if (known := self._identify(authorization, task, verb)) is None:
            return Denial(refusal=Refused.because(NOT_AUTHENTICATED), task=task, verb=verb)
        if known.requests_per_minute is not None:
            wait = self._rates.take(2 * known.tenant_id, known.requests_per_minute)
            if wait is not None:
                return Denial(refusal=Refused.because(TOO_MANY, wait), task=task, verb=verb, _known=known)
        if not _may(known, task, verb):
            return Denial(refusal=Refused.because(NOT_FOUND), task=task, verb=verb, _known=known)
        if not known.has_room_for(features):
            detail = f"{features} features"
            return Denial(refusal=Refused.because(SPENT), task=task, verb=verb, detail=detail, _known=known)
        return Admission(
            tenant=known.tenant,
            role=known.role,
            task=task,
            verb=verb,
            token=known.token.id,
            _tenant_id=known.tenant_id,
            _gate=self,
        )

    def write_down(self, denial: Denial) -> Refused:
        """Into the audit log. Returns what is to be raised."""
        known = denial._known
        number, name, token = (_NOBODY, "", "") if known is None else (known.tenant_id, known.tenant, known.token.id)
        self._write_some(number, name, token, denial.task, denial.verb, denial.refusal.status, denial.detail)
        return denial.refusal

    def audit(self, admission: Admission | None, *, task: str, verb: str, outcome: int, detail: str = "") -> None:
        """Write down what came of a request: a status, and names and numbers, never contents.

        What `admit` and `charge` refuse is written down already.
        """
        if admission is None:
            self._write_some(_NOBODY, "", "", task, verb, outcome, detail)
            return
        self._audit.write(
            tenant=admission.tenant, token=admission.token, task=task, verb=verb, outcome=outcome, detail=detail
        )

    def charge_each(self, publications: Sequence[tuple[Admission, str]]) -> list[Refused | None]:
        """`Admission.charge` of one feature each, of a version and without bits, in one transaction of the registry.

        Says of each why it may not be released, or None; what is refused keeps none of the others out.
        """
        if not publications:
            return []
        with self._bookings.booking() as db:
            refused = [self._refused(db, to) for to, _ in publications]
        for (to, version), refusal in zip(publications, refused, strict=True):
            if refusal is not None:
                self._write_refusal(refusal, to, _asked(1, version))
        return refused

    def audit_releases(self, releases: Sequence[tuple[Admission, str]]) -> None:
        """Write down that requests were answered, each with its detail: at once, so that the disk is asked once."""
        self._audit.write_all(
            [
                AuditEntry(tenant=to.tenant, token=to.token, task=to.task, verb=to.verb, outcome=_OK, detail=detail)
                for to, detail in releases
            ]
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _identify(self, authorization: str | None, task: str, verb: str) -> Standing | None:
        """Who asks; None for nobody. What it takes does not depend on how much of a token is right."""
        token = Token.from_header(authorization)
        if token is None:
            return None
        known = self._reader.standing(token.id, task if NAME.fullmatch(task) else "", verb)
        proved = token.matches(None if known is None else known.digest)
        return known if proved and known is not None and known.token.is_valid(self._clock()) else None

    def _charge(
        self, to: Admission, digests: Sequence[bytes], version: str, bits: float | None, fresh: bool, features: int
    ) -> None:
        if features < 0:
            raise ConfigError(f"features are counted from 0, got {features}")

        try:
            if bits is not None:
                self._check_room(self._reader.standing(to.token, to.task, to.verb), to, features)
                self._bits.charge(to.tenant, to.task, version, digests, bits, fresh=fresh)
            with self._bookings.booking() as db:
                self._book(db, to, features)
        except (Refused, BitBudgetExceededError) as error:
            refusal = error if isinstance(error, Refused) else Refused.because(SPENT)
            each = "" if bits is None else f", {bits:g} bits each"
            self._write_refusal(refusal, to, f"{_asked(features, version)}{each}")
            raise refusal from None

    def _book(self, db: sqlite3.Connection, to: Admission, features: int) -> None:
        """Raises `Refused`, and has then written nothing."""
        self._check_room(standing(db, to.token, to.task, to.verb), to, features)
        book_features(db, to._tenant_id, to.task, features)

    def _refused(self, db: sqlite3.Connection, to: Admission) -> Refused | None:
        try:
            self._book(db, to, 1)
        except Refused as error:
            return error
        return None

    def _charge_training(
        self, to: Admission, digests: Sequence[bytes], version: str, bits: float, releases: int
    ) -> None:
        try:
            self._still(self._reader.standing(to.token, to.task, to.verb), to)
            if releases:
                self._bits.check_room(to.tenant, to.task, version, releases, bits)
            self._bits.charge(to.tenant, to.task, version, digests, bits, fresh=False)
        except (Refused, BitBudgetExceededError) as error:
            refusal = error if isinstance(error, Refused) else Refused.because(SPENT)
            self._write_refusal(refusal, to, f"{max(releases, len(digests))} features of {version}, {bits:g} bits each")
            if refusal is error:
                raise
            raise refusal from error

    def _recheck(self, admission: Admission) -> None:
        try:
            self._still(self._reader.standing(admission.token, admission.task, admission.verb), admission)
        except Refused as error:
            self._write_refusal(error, admission, "no longer")
            raise

    def _check_room(self, now: Standing | None, admission: Admission, features: int) -> None:
        if not self._still(now, admission).has_room_for(features):
            raise Refused.because(SPENT)

    def _still(self, now: Standing | None, admission: Admission) -> Standing:
        if now is None or not now.token.is_valid(self._clock()):
            raise Refused.because(NOT_AUTHENTICATED)
        if not _may(now, admission.task, admission.verb):
            raise Refused.because(NOT_FOUND)
        return now

    def _write_refusal(self, refusal: Refused, to: Admission, detail: str) -> None:
        self._write_some(to._tenant_id, to.tenant, to.token, to.task, to.verb, refusal.status, detail)

    def _write_some(
        self, number: int, tenant: str, token: str, task: str, verb: str, outcome: int, detail: str
    ) -> None:
        """A refusal's line, unless there were too many of the same tenant: those are counted in the next."""
        if self._rates.take(2 * number + 1, _LINES_PER_MINUTE) is not None:
            self._unwritten[number] = self._unwritten.get(number, 0) + 1
            return
        if unwritten := self._unwritten.pop(number, 0):
            detail = f"{detail}; {unwritten} more refusals before it".removeprefix("; ")
        self._audit.write(tenant=tenant, token=token, task=task, verb=verb, outcome=outcome, detail=detail)


def _asked(features: int, version: str) -> str:
    return f"{features} features of version {version}"


def _may(known: Standing, task: str, verb: str) -> bool:
    """Whether the role has the verb at all, and the tenant this task; an operator has every task."""
    if verb not in VERBS_OF_ROLE[known.role]:
        return False
    return known.granted or verb == "operate"
