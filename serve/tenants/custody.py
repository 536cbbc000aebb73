"""What the custodian of labels knows, and the bytes that it keeps it as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from orchestrator.errors import LedgerError

Name = tuple[str, str, str]
"""Tenant, task, subset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Custody:
    """The key of one tenant's labels of one task and subset."""

    tenant: str
    task: str
    subset: str
    not_before: float
    """Unix time from which it is given out."""
    deposited: float
    released: float | None
    """Unix time at which it was given out first; None: it was not."""
    wrapped_key: bytes = field(repr=False)
    """Sealed to the tenant; empty where it is only told what is held."""

    @property
    def name(self) -> Name:
        """By which it is asked for."""
        return self.tenant, self.task, self.subset

    def is_due(self, now: float) -> bool:
        """Whether it may be given out."""
        return now >= self.not_before


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyState:
    """Everything that is held, and the latest time that was seen. A value: a change makes another."""

    latest: float | None = None
    """Unix time; None where nothing is held."""
    entries: Mapping[Name, Custody] = field(default_factory=dict)

    def at(self, now: float) -> CustodyState:
        """Having seen this time. What was seen is not forgotten for an earlier one."""
        return replace(self, latest=now if self.latest is None else max(self.latest, now))

    def having(self, entry: Custody) -> CustodyState:
        """With it, in the place of one of the same name."""
        return replace(self, entries={**self.entries, entry.name: entry})

    def without(self, name: Name) -> CustodyState:
        """Where nothing is left there is nothing that a clock could open early, so no time is remembered."""
        left = {key: entry for key, entry in self.entries.items() if key != name}
        return CustodyState(latest=self.latest if left else None, entries=left)

    def to_bytes(self) -> bytes:
        """JSON. Secrets are in it: for a file that is encrypted."""
        entries = [{**asdict(entry), "wrapped_key": entry.wrapped_key.hex()} for entry in self.entries.values()]
        return json.dumps({"latest": self.latest, "entries": entries}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> CustodyState:
        """What `to_bytes` gave. Raises `LedgerError`."""
        try:
            content = json.loads(data)
            held = [
                Custody(**{**entry, "wrapped_key": bytes.fromhex(entry["wrapped_key"])}) for entry in content["entries"]
            ]
            return cls(latest=content["latest"], entries={entry.name: entry for entry in held})
        except (ValueError, TypeError, KeyError) as error:
            raise LedgerError("the custody of labels is of another version of this program") from error
