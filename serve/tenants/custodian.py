"""The custodian of labels: holds what opens a tenant's labels, and gives it out when the time has come, not before.

    deposit    labels that are sealed to a tenant are parted: the ciphertext may be handed over at once, the wrapped
               key stays here
    release    the wrapped key, from ``not_before`` on; each time it is asked for, granted or refused, is written down
    erase      the wrapped key is destroyed; before its release, nobody can ever read the labels again

What is held is sealed to the tenant's public key, so the custodian cannot read labels, and the tenant without the
custodian cannot either. It is plain files of the process that opens them: it does not travel to Ray.

The store is one file under AES-256-GCM. Every change writes it anew under a fresh key, and then puts that key in the
place of the last, which is what makes the change hold: copies of earlier stores are unreadable from then on, so an
entry that was erased is gone from them too, and putting an earlier store back is noticed. A crash leaves the one or
the other. Erasure is as good as the disk under the key file: a copy of that file keeps alive what it opens.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from orchestrator.errors import ConfigError, DataError, LedgerError
from orchestrator.wire import SealedLabels
from serve.private_files import read_private, write_private
from serve.tenants.audit import AuditLog
from serve.tenants.custody import Custody, CustodyState
from serve.tenants.errors import NOT_FOUND, Refused
from serve.tenants.moments import shown
from serve.tenants.registry import check_name

EARLY: Final = 403
CLOCK_SET_BACK: Final = 503

_PURPOSE: Final = b"metamorphosis custody v1"
_KEY_FILE: Final = struct.Struct("<24sQ32s")
"""Purpose, generation, key."""
_NONCE_BYTES: Final = 12
_MOST_BYTES: Final = 1 << 26
_SLEW_S: Final = 5.0
"""By so much clocks of threads and processes may disagree, and time servers may set one back."""
_QUIET_S: Final = 60.0
"""At most one refusal of the same kind and tenant is written down in so many seconds, with the number of the others."""


@dataclass(frozen=True, slots=True)
class Custodian:
    """Of the labels of one producer. Many threads and processes of one machine may use the same files."""

    folder: Path
    """Of the store."""
    key_file: Path
    """Beside the store or elsewhere; readable by its owner alone."""
    log: AuditLog = field(repr=False)
    _quiet: dict[tuple[str, int], tuple[float, int]] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a custodian stays in the process that opened it")

    def deposit(self, tenant: str, sealed: SealedLabels, *, not_before: float, now: float) -> SealedLabels:
        """Keep the wrapped key until ``not_before`` (Unix time). Returns the labels without it, to be handed over.

        Raises `ConfigError` where labels of this tenant, task and subset are held: a time that was set stays.
        """
        check_name("tenant", tenant)
        check_name("task", sealed.task)
        if not math.isfinite(not_before):
            raise ConfigError(f"the time of release must be finite, got {not_before}")
        if not sealed.wrapped_key:
            raise ConfigError("these labels have no key with them: they were parted from it before")
        entry = Custody(
            tenant=tenant,
            task=sealed.task,
            subset=sealed.subset,
            not_before=not_before,
            deposited=now,
            released=None,
            wrapped_key=sealed.wrapped_key,
        )
        with self._alone():
            state = self._seen(self._load(), now, entry.name, "seal")
            if entry.name in state.entries:
                raise ConfigError(
                    f"the {entry.subset!r} labels of task {entry.task!r} are held for {tenant!r} already: "
                    "erase them first"
                )
            self._save(state.having(entry).at(now))
        self._write(entry.name, "seal", 201, f"not before {shown(not_before)}")
        return replace(sealed, wrapped_key=b"")

    def release(self, tenant: str, task: str, subset: str, now: float) -> bytes:
        """The wrapped key, for `SealedLabels.wrapped_key`; the same one each time it is asked for.

        Raises `Refused`: 403 before its time, with ``retry_after``; 404 where nothing is held for this tenant, or it
        was erased. Raises `LedgerError` if the clock was set back, or the store is not the one that was written.
        """
        name = (tenant, task, subset)
        with self._alone():
            before = self._load()
            state = self._seen(before, now, name, "release")
            entry = state.entries.get(name)
            if entry is not None and entry.is_due(now) and entry.released is None:
                state = state.having(replace(entry, released=now))
            if state is not before:
                self._save(state)
        if entry is None:
            self._refuse(name, "release", NOT_FOUND, now, "nothing is held")
            error = Refused.because(NOT_FOUND)
            error.add_note(f"No {subset!r} labels of task {task!r} are held for {tenant!r}")
            raise error
        if not entry.is_due(now):
            told = f"not before {shown(entry.not_before)}"
            self._refuse(name, "release", EARLY, now, told)
            error = Refused(EARLY, "these labels are not released yet", entry.not_before - now)
            error.add_note(told)
            raise error
        self._write(name, "release", 200, "")
        return entry.wrapped_key

    def erase(self, tenant: str, task: str, subset: str) -> Custody:
        """Destroy what is held, whatever the clock says. Returns what it was, without the key.

        Raises `ConfigError` if there is none. Where nothing is left, no time is remembered any more.
        """
        name = (tenant, task, subset)
        with self._alone():
            state = self._load()
            if (entry := state.entries.get(name)) is None:
                raise ConfigError(f"no {subset!r} labels of task {task!r} are held for {tenant!r}")
            self._save(state.without(name))
        self._write(name, "erase", 200, "released before" if entry.released is not None else "never released")
        return replace(entry, wrapped_key=b"")

    def held(self) -> list[Custody]:
        """Everything, without the keys, by name."""
        with self._alone():
            entries = self._load().entries
        return [replace(entries[name], wrapped_key=b"") for name in sorted(entries)]

    # -- the clock -----------------------------------------------------------------------------------------------------

    def _seen(self, state: CustodyState, now: float, name: tuple[str, str, str], verb: str) -> CustodyState:
        """The state that remembers this time. Raises `LedgerError` if it is before one that was seen."""
        if not math.isfinite(now):
            raise ConfigError(f"the time must be finite, got {now}")
        latest = state.latest
        if latest is not None and now < latest - _SLEW_S:
            told = f"the clock was set back: it is {shown(now)}, and was {shown(latest)} before"
            self._refuse(name, verb, CLOCK_SET_BACK, now, told)
            raise LedgerError(f"{told}. No labels are taken or released until it is right")
        return state if latest is None or now <= latest + _SLEW_S else state.at(now)

    # -- the files -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time, of all threads and processes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(f"cannot open the custody {self.folder}: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        except DataError as error:
            raise LedgerError(str(error)) from error
        finally:
            os.close(lock)

    def _load(self) -> CustodyState:
        if not self.key_file.exists():
            if stores := self._stores():
                raise LedgerError(f"the key {self.key_file} of {stores[0]} is missing: what is held cannot be opened")
            return CustodyState()
        generation, key = self._key()
        if generation == 0:
            return CustodyState()
        path = self._store(generation)
        try:
            sealed = read_private(path, what="the custody of labels", most=_MOST_BYTES)
            plain = AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _context(generation))
        except (InvalidTag, ValueError) as error:
            raise LedgerError(
                f"{path} is not the custody that was written last: it was changed, or put in the place of it, "
                f"or {self.key_file} is the key of another. Nothing is released"
            ) from error
        return CustodyState.from_bytes(plain)

    def _save(self, state: CustodyState) -> None:
        generation = self._key()[0] + 1 if self.key_file.exists() else 1
        if generation == 1:
            self._write_key(0, bytes(32))  # a store without a key file is one whose key was lost
        key, nonce = AESGCM.generate_key(256), os.urandom(_NONCE_BYTES)
        sealed = nonce + AESGCM(key).encrypt(nonce, state.to_bytes(), _context(generation))
        write_private(self._store(generation), sealed, what="the custody of labels", replace=True)
        self._write_key(generation, key)
        for path in self._stores():
            if path != self._store(generation):
                path.unlink(missing_ok=True)

    def _key(self) -> tuple[int, bytes]:
        """(generation, key)."""
        raw = read_private(self.key_file, what="the key of the custody", most=_KEY_FILE.size)
        if len(raw) != _KEY_FILE.size or not raw.startswith(_PURPOSE):
            raise LedgerError(f"{self.key_file} is no key of a custody, or is damaged")
        _, generation, key = _KEY_FILE.unpack(raw)
        return generation, key

    def _write_key(self, generation: int, key: bytes) -> None:
        raw = _KEY_FILE.pack(_PURPOSE, generation, key)
        write_private(self.key_file, raw, what="the key of the custody", replace=True)

    def _store(self, generation: int) -> Path:
        return self.folder / f"custody-{generation}.sealed"

    def _stores(self) -> list[Path]:
        return sorted(self.folder.glob("custody-*.sealed"))

    # -- the log -------------------------------------------------------------------------------------------------------

    def _write(self, name: tuple[str, str, str], verb: str, outcome: int, detail: str) -> None:
        tenant, task, subset = name
        told = f"labels {subset}; {detail}".removesuffix("; ")
        self.log.write(tenant=tenant, token="", task=task, verb=verb, outcome=outcome, detail=told)

    def _refuse(self, name: tuple[str, str, str], verb: str, outcome: int, now: float, detail: str) -> None:
        """Write a refusal down, unless the same was written just now: whoever asks in vain cannot fill the disk."""
        kind = (name[0], outcome)
        last, unwritten = self._quiet.get(kind, (-math.inf, 0))
        if abs(now - last) < _QUIET_S:
            self._quiet[kind] = (last, unwritten + 1)
            return
        self._quiet[kind] = (now, 0)
        more = f"; {unwritten} more refusals before it" if unwritten else ""
        self._write(name, verb, outcome, detail + more)


def _context(generation: int) -> bytes:
    return _PURPOSE + struct.pack("<Q", generation)
