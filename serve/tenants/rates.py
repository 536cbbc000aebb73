"""How fast somebody may ask: a bucket of so many requests, refilled at so many a minute, shared by all processes.

By the generic cell rate algorithm (ITU-T I.371): of every bucket only the time is kept at which it is full again. It is
one double in a file of doubles; a lost file is full buckets, so nothing is ever synced to the disk.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from orchestrator.errors import LedgerError

_SLOT: Final = struct.Struct("<d")
_MINUTE_S: Final = 60.0
_ROUNDING_S: Final = 1e-9


class RateFile:
    """Buckets by number. Threads and processes of one machine may use the file at once.

    Times are of the machine's monotonic clock: setting the wall clock changes nothing, and what is kept from before a
    reboot is taken for a full bucket.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Open the file, or begin one that only its owner can read. Raises `LedgerError`."""
        self._clock = clock
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(f"cannot open the file of request rates {path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def take(self, slot: int, per_minute: int) -> float | None:
        """Take one request from a bucket; None if there was one, else the seconds until there is."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                return self._take(slot, per_minute)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _take(self, slot: int, per_minute: int) -> float | None:
        now, interval = self._clock(), _MINUTE_S / per_minute
        raw = os.pread(self._file, _SLOT.size, slot * _SLOT.size)
        full_at: float = _SLOT.unpack(raw)[0] if len(raw) == _SLOT.size else now
        if not math.isfinite(full_at) or not now <= full_at <= now + _MINUTE_S + _ROUNDING_S:
            full_at = now
        wait = full_at + interval - _MINUTE_S - now
        if wait > _ROUNDING_S:
            return wait
        os.pwrite(self._file, _SLOT.pack(full_at + interval), slot * _SLOT.size)
        return None
