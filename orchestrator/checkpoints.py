"""The checkpoints of one training: a folder of numbered states, of which the newest whole one counts.

Every file is written beside its name and renamed, and carries its own checksum, so a process that dies while it writes
leaves the one before. Two are kept: one that is damaged later is passed over with a warning, never used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.checkpoint import load_state, save_state
from orchestrator.errors import CheckpointError

logger = logging.getLogger(__name__)

_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where one training keeps its states. Plain data: it travels to the process that trains."""

    folder: Path
    kind: str
    """What is saved: a state of another kind is refused."""
    identity: str
    """Which training it is. A checkpoint of any other is refused, however much it looks alike."""
    keep: int = 2
    """How many of the newest stay."""

    def save(self, step: int, state: Mapping[str, Any], *, spare: Collection[int] = ()) -> None:
        """Write the state after ``step`` steps; those after ``spare`` stay, however old.

        Raises `OSError` if it cannot; what was there before is still whole.
        """
        save_state(self._path(step), {"identity": self.identity, "step": step, "state": dict(state)}, kind=self.kind)
        spared = {self._path(step) for step in spare}
        for old in self._paths()[: -self.keep]:
            if old not in spared:
                old.unlink(missing_ok=True)
        self._sweep()

    def try_save(self, step: int, state: Mapping[str, Any]) -> str | None:
        """`save`, or what went wrong: a training that cannot save goes on, and saves at the next occasion."""
        try:
            self.save(step, state)
        except OSError as error:
            return (
                f"no checkpoint after step {step}: cannot write to {self.folder} ({error.strerror or error}). "
                "The training goes on; if it is interrupted now, it resumes from the checkpoint before"
            )
        return None

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """(steps, state) of the newest whole checkpoint, or None if nothing was ever saved.

        Raises `CheckpointError` for a checkpoint of another training, and where there are files but none is whole.
        """
        complaints: list[str] = []
        for path in reversed(self._paths()):
            try:
                saved = load_state(path, kind=self.kind)
            except CheckpointError as error:
                complaints.append(str(error))
                continue
            if saved.get("identity") != self.identity:
                raise CheckpointError(
                    f"{path} belongs to another training: other settings, another data set or another start. "
                    "Resume with exactly the settings that the run was started with, or start anew"
                )
            for complaint in complaints:
                logger.warning("going on from %s instead, an earlier checkpoint: %s", path.name, complaint)
            return int(saved["step"]), saved["state"]
        if complaints:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is whole; start anew. " + "; ".join(complaints)
            )
        return None

    def at(self, step: int) -> dict[str, Any]:
        """The state after that step. Raises `CheckpointError` if it is not there, not whole, or of another training."""
        path = self._path(step)
        if not path.exists():
            raise CheckpointError(
                f"there is no state after step {step} in {self.folder}: it was removed, or never kept"
            )
        saved = load_state(path, kind=self.kind)
        if saved.get("identity") != self.identity:
            raise CheckpointError(f"{path} belongs to another training: start anew, in another folder")
        state: dict[str, Any] = saved["state"]
        return state

    def forget_after(self, step: int) -> None:
        """Remove the states after later steps: the training has gone back, and will have others there."""
        for path in self._paths():
            if path > self._path(step):
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:0{_DIGITS}d}"

    def _paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-" + "[0-9]" * _DIGITS))

    def _sweep(self) -> None:
        """Remove what a writer that was killed left half written. Only one process writes to the folder."""
        for path in self.folder.glob(".step-*.tmp"):
            path.unlink(missing_ok=True)


def make_private(folder: Path) -> Path:
    """Create a folder that only its owner can enter: what is in it would undo the noise."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o700)  # noqa: PTH101 - as mkdir's mode, but whatever the umask says
    return folder
