"""How much is asked of each task, and how fast it is answered, over the last quarter of an hour.

Replicas are processes of their own. Each one keeps counts in slots of ten seconds and writes them every other second to
a small file that nobody else writes; whoever wants to know adds the files up. A replica that is killed loses the last
two seconds of its counts, and a file that is lost is lost counts: nothing else depends on them.

Latencies are counted in bins whose edges grow by a quarter, so a quantile is right to about an eighth of itself.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from serve.ports import Meter

logger = logging.getLogger(__name__)

SLOT_S: Final = 10
SLOTS: Final = 90
"""That are kept: a quarter of an hour."""
_FORMAT: Final = 1
_WRITE_EVERY_S: Final = 2.0
_FORGOTTEN_S: Final = 2.0 * SLOT_S * SLOTS
"""After which a file that nobody writes any more is removed."""
_FIRST_EDGE_S, _GROWTH = 0.0005, 1.25
_EDGES_S: Final = tuple(_FIRST_EDGE_S * _GROWTH**k for k in range(54))
"""Upper edges of the bins, 0.5 ms to 70 s; what is above them all is in a bin of its own."""

Key = tuple[str, str]
"""Task and verb."""


def traffic_folder(serving: Path) -> Path:
    """Of the files, below the folder of what serving keeps."""
    return serving / "traffic"


@dataclass(kw_only=True, slots=True)
class Counts:
    """Requests of one verb of one task in some time."""

    answered: int = 0
    refused: int = 0
    """With a status of 400 to 499."""
    failed: int = 0
    """With one of 500 and above: 503 while a replica is too busy included."""
    bins: dict[int, int] = field(default_factory=dict)
    """Requests by bin of their latency."""

    @property
    def total(self) -> int:
        """Of all outcomes."""
        return self.answered + self.refused + self.failed

    def count(self, status: int, seconds: float) -> None:
        """One request more."""
        if status >= 500:
            self.failed += 1
        elif status >= 400:
            self.refused += 1
        else:
            self.answered += 1
        place = bisect_right(_EDGES_S, seconds)
        self.bins[place] = self.bins.get(place, 0) + 1

    def add(self, other: Counts) -> None:
        """All of another one's."""
        self.answered += other.answered
        self.refused += other.refused
        self.failed += other.failed
        for place, n in other.bins.items():
            self.bins[place] = self.bins.get(place, 0) + n

    def quantile(self, q: float) -> float | None:
        """Seconds within which that part of the requests was answered; None where there was none."""
        total = sum(self.bins.values())
        rank, before = q * total, 0
        for place, n in sorted(self.bins.items()):
            if before + n >= rank and n:
                low = 0.0 if place == 0 else _EDGES_S[place - 1]
                high = _EDGES_S[min(place, len(_EDGES_S) - 1)]
                return low + (high - low) * min(1.0, max(0.0, (rank - before) / n))
            before += n
        return None

    def to_json(self) -> list[Any]:
        """A JSON-ready list."""
        return [self.answered, self.refused, self.failed, sorted(self.bins.items())]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Counts:
        """Read what `to_json` wrote. Raises `ValueError` or `TypeError` for anything else."""
        answered, refused, failed, bins = data
        found = cls(answered=int(answered), refused=int(refused), failed=int(failed))
        found.bins = {int(place): int(n) for place, n in bins}
        return found


class TrafficMeter:
    """`serve.ports.Meter` of one process, into a file of its own. Many threads may use it."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Begin to write below ``folder``. A disk that cannot be written is logged once, and stops nothing."""
        self._clock, self._folder = clock, folder
        self._path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._slots: dict[int, dict[Key, Counts]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._changed = self._told = False
        _remove_forgotten(folder, clock())
        self._writer = threading.Thread(target=self._write_on, name="traffic", daemon=True)
        self._writer.start()

    def request(self, *, tenant: str, task: str, verb: str, status: int, seconds: float) -> None:
        """See `serve.ports.Meter.request`."""
        slot = int(self._clock()) // SLOT_S
        with self._lock:
            self._slots.setdefault(slot, {}).setdefault((task, verb), Counts()).count(status, seconds)
            self._changed = True

    def released(self, *, tenant: str, task: str, version: str, features: int, size_bytes: int) -> None:
        """See `serve.ports.Meter.released`: not counted here."""

    def close(self) -> None:
        """Write what is not written yet, and end."""
        self._closed.set()
        self._writer.join()

    def _write_on(self) -> None:
        while not self._closed.wait(_WRITE_EVERY_S):
            self.flush()
        self.flush()

    def flush(self) -> None:
        """Write now what changed since the last time."""
        oldest = int(self._clock()) // SLOT_S - SLOTS
        with self._lock:
            if not self._changed:
                return
            self._changed = False
            for slot in [slot for slot in self._slots if slot < oldest]:
                del self._slots[slot]
            slots = [
                [slot, task, verb, counts.to_json()]
                for slot, by_key in self._slots.items()
                for (task, verb), counts in by_key.items()
            ]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"format": _FORMAT, "slots": slots}))
            temporary.replace(self._path)
        except OSError as error:
            if not self._told:
                logger.warning("request rates cannot be written to %s: %s", self._path, error)
            self._told = True


class Meters:
    """Several meters as one."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters

    def request(self, *, tenant: str, task: str, verb: str, status: int, seconds: float) -> None:
        """See `serve.ports.Meter.request`."""
        for meter in self._meters:
            meter.request(tenant=tenant, task=task, verb=verb, status=status, seconds=seconds)

    def released(self, *, tenant: str, task: str, version: str, features: int, size_bytes: int) -> None:
        """See `serve.ports.Meter.released`."""
        for meter in self._meters:
            meter.released(tenant=tenant, task=task, version=version, features=features, size_bytes=size_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Of all replicas, as the files say it."""

    slots: Mapping[int, Mapping[Key, Counts]]
    now_slot: int
    """The one that has just begun: the last whole one is before it."""

    def asked(self) -> list[Key]:
        """Tasks and verbs that were asked for."""
        return sorted({key for by_key in self.slots.values() for key in by_key})

    def over(self, key: Key, minutes: int) -> Counts:
        """The last whole minutes."""
        found = Counts()
        for slot in range(self.now_slot - minutes * 60 // SLOT_S, self.now_slot):
            if (counts := self.slots.get(slot, {}).get(key)) is not None:
                found.add(counts)
        return found

    def per_minute(self, key: Key, minutes: int) -> float:
        """Requests a minute, over the last whole minutes."""
        return self.over(key, minutes).total / minutes

    def history(self, key: Key) -> list[int]:
        """Requests of each whole slot that is kept, oldest first."""
        found = (self.slots.get(slot, {}).get(key) for slot in range(self.now_slot - SLOTS, self.now_slot))
        return [0 if counts is None else counts.total for counts in found]


def read_traffic(folder: Path, *, clock: Callable[[], float] = time.time) -> Traffic:
    """Add up what every replica wrote. A file that is none of them, or damaged, is left out."""
    now_slot = int(clock()) // SLOT_S
    slots: dict[int, dict[Key, Counts]] = {}
    for path in sorted(folder.glob("*.json")):
        for slot, key, counts in _read(path):
            if now_slot - SLOTS <= slot <= now_slot:
                slots.setdefault(slot, {}).setdefault(key, Counts()).add(counts)
    return Traffic(slots=slots, now_slot=now_slot)


def _read(path: Path) -> Iterator[tuple[int, Key, Counts]]:
    try:
        found = json.loads(path.read_text())
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']}")
        lines = [(int(slot), (str(task), str(verb)), Counts.from_json(c)) for slot, task, verb, c in found["slots"]]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s holds no request counts (%s)", path, error)
        return
    yield from lines


def _remove_forgotten(folder: Path, now: float) -> None:
    for path in folder.glob("*.*"):
        try:
            if path.suffix in {".json", ".tmp"} and path.stat().st_mtime < now - _FORGOTTEN_S:
                path.unlink()
        except OSError:  # another replica removed it, or may not be asked
            continue
