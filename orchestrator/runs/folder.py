"""What one run remembers of itself, so that another process can go on where it died.

    <storage>/runs/<command>-<digest of the settings>-<attempt>/
        run.json        who it is, its secrets, its reservations, what it published; readable by its owner alone
        <part>/step-*   the checkpoints of each part of the run

The secrets are the seeds of the noise and of the batches of each private training. They are what makes a resumed run
take the very steps that were charged, and whoever reads them can take the noise off again. The folder is removed when
the run has published everything.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from filelock import FileLock, Timeout

from orchestrator.checkpoint import write_atomically
from orchestrator.checkpoints import Checkpoints, make_private
from orchestrator.config import to_mapping
from orchestrator.errors import CheckpointError, ConfigError, LedgerError, PartyLostError, UnavailableError
from orchestrator.sampling import derive_seed
from orchestrator.settings.shared import RuntimeSettings

_NOTES: Final = "run.json"
_LOCK: Final = "lock"
_VERSION: Final = 1
_PASSING: Final = (UnavailableError, PartyLostError, LedgerError, OSError, KeyboardInterrupt)
"""What may be over when the run is resumed, without anything having been changed."""


class RunFolder:
    """One attempt at one command with certain settings. Held by one process at a time; a dead one holds nothing.

    A context manager: on leaving, an attempt that has nothing to go on from is removed.
    """

    def __init__(self, path: Path, lock: FileLock, notes: dict[str, Any]) -> None:
        self.path, self._lock, self._notes = path, lock, notes

    @classmethod
    def open(cls, command: str, settings: Any, runtime: RuntimeSettings, *, resume: bool) -> RunFolder:
        """A new attempt, or with ``resume`` the newest one with these settings that no living process holds."""
        root, name = runtime.storage_path / "runs", f"{command}-{_digest(settings)}"
        return cls._resume(root, name) if resume else cls._start(root, name)

    @classmethod
    def _start(cls, root: Path, name: str) -> RunFolder:
        root.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name.rpartition("-")[2]) for p in _attempts(root, name)), default=0)
        while True:
            number += 1
            path = root / f"{name}-{number}"
            try:
                path.mkdir()
            except FileExistsError:
                continue  # another process started the same at this moment
            make_private(path)
            lock = FileLock(path / _LOCK)
            lock.acquire()
            folder = cls(path, lock, {"version": _VERSION, "run": secrets.token_hex(8)})
            folder.remember()
            return folder

    @classmethod
    def _resume(cls, root: Path, name: str) -> RunFolder:
        running = False
        for path in reversed(_attempts(root, name)):
            lock = FileLock(path / _LOCK, blocking=False)
            try:
                lock.acquire()
            except Timeout:
                running = True
                continue
            return cls(path, lock, _read_notes(path / _NOTES))
        if running:
            raise ConfigError("nothing to resume: the only run with these settings is still going on")
        raise ConfigError(
            f"nothing to resume: no interrupted run with these settings in {root}. A run can be resumed with exactly "
            "the settings that it was started with; start it without --resume"
        )

    # -- notes ---------------------------------------------------------------------------------------------------------

    @property
    def run(self) -> str:
        """Who this attempt is: the same in every process that goes on with it."""
        return str(self._notes["run"])

    def remember(self, **notes: Any) -> None:
        """Keep these, on the disk before it returns. Values are JSON."""
        self._notes |= notes
        path = self.path / _NOTES
        write_atomically(path, json.dumps(self._notes).encode())
        path.chmod(0o600)

    def recall(self, name: str, default: Any = None) -> Any:
        """What was remembered under that name."""
        return self._notes.get(name, default)

    def secret(self, part: str, *, fixed: int | None = None) -> int:
        """The seed of one private training's noise and batches: drawn once from the operating system, then the same.

        ``fixed`` is the user's own, and stands in the settings already. Every part has a stream of its own: noise that
        is used twice on different gradients cancels in their difference.
        """
        if fixed is not None:
            return derive_seed(fixed, part)
        kept: dict[str, int] = self.recall("secrets", {})
        if part not in kept:
            self.remember(secrets={**kept, part: secrets.randbits(63)})
        return int(self.recall("secrets")[part])

    def tracked_by(self, run_id: str) -> None:
        """Note under which tracking run this process publishes."""
        known: list[str] = self.recall("tracking_runs", [])
        if run_id not in known:
            self.remember(tracking_runs=[*known, run_id])

    def published_here(self, run_id: str) -> bool:
        """Whether that tracking run is one of this attempt's, in this process or an earlier one."""
        return run_id in self.recall("tracking_runs", [])

    def checkpoints(self, part: str, *, identity: str) -> Checkpoints:
        """The checkpoints of one part of the run."""
        return Checkpoints(folder=make_private(self.path / part), kind=part, identity=f"{self.run}-{identity}")

    def leave_unfinished(self, *, unfinished: bool = True) -> None:
        """Note whether there is something to go on with although the run ends without an error."""
        self.remember(unfinished=unfinished)

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Everything is published: remove all of it, the secrets first."""
        (self.path / _NOTES).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (kind is None and not self.recall("unfinished")) or not self._worth_resuming():
            self.finish()
        elif isinstance(error, _PASSING):
            error.add_note("Nothing that was trained is lost: the same command with --resume goes on from there")
        self._lock.release()

    def _worth_resuming(self) -> bool:
        begun = self.recall("unfinished") or self.recall("reservations")
        return bool(begun) or any(self.path.glob("*/step-*"))


def _digest(settings: Any) -> str:
    """Of what is trained. Where it runs, and on how many machines, may change between two attempts."""
    mapping = to_mapping(settings)
    for ignored in ("runtime", "resume"):
        mapping.pop(ignored, None)
    if "remote" in mapping:  # where the tenant is may change, whether it is hosted may not
        mapping["remote"] = "remote" in mapping["remote"]
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]


def _attempts(root: Path, name: str) -> list[Path]:
    """Oldest first; without those that are finished and only half removed."""
    found = [p for p in root.glob(f"{name}-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted((p for p in found if (p / _NOTES).exists()), key=lambda p: int(p.name.rpartition("-")[2]))


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
        if notes["version"] != _VERSION or not isinstance(notes["run"], str):
            raise CheckpointError(f"{path} was written by another version of this program; start anew")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged, or not a run's memory: {error}; start anew") from error
    return dict(notes)
