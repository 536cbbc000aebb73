"""What is to be served, on disk: one JSON file in the storage folder, written whole or not at all.

It is what the operator asked for and what Serve was brought to. Every change is of one task, under a lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from orchestrator.checkpoint import write_atomically
from orchestrator.errors import CheckpointError, ConfigError, NotPublishedError, UnavailableError
from serve.arguments import TaskArgs, VersionArgs

FORMAT: Final = 1
_PATIENCE_S: Final = 30.0
_REMEMBERED: Final = 10
"""Versions that a task can be rolled back to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """One task as it is served."""

    args: TaskArgs
    previous: tuple[VersionArgs, ...] = ()
    """What was served before, newest first."""

    @property
    def task(self) -> str:
        """Its name."""
        return self.args.task

    def updated(self, version: VersionArgs, share: float | None) -> Deployed:
        """All of the images to that version, or a share of them as a canary. Raises `ConfigError`."""
        if share is not None and version.version == self.args.current.version:
            raise ConfigError(f"version {version.version} of task {self.task!r} is served already: leave --share out")
        if share is not None:
            return replace(self, args=self.args.model_copy(update={"canary": version, "share": share}))
        before = (self.args.current, *self.previous)
        kept = tuple(old for old in before if old.version != version.version)[:_REMEMBERED]
        args = self.args.model_copy(update={"current": version, "canary": None, "share": 0.0})
        return replace(self, args=args, previous=kept)

    def rolled_back(self) -> Deployed:
        """Without its canary, or to the version before. Raises `ConfigError` where there is neither."""
        if self.args.canary is not None:
            return replace(self, args=self.args.model_copy(update={"canary": None, "share": 0.0}))
        if not self.previous:
            raise ConfigError(f"no version of task {self.task!r} was served before {self.args.current.version}")
        args = self.args.model_copy(update={"current": self.previous[0]})
        return replace(self, args=args, previous=self.previous[1:])

    def scaled(self, min_replicas: int, max_replicas: int) -> Deployed:
        """With so many replicas."""
        replicas = self.args.replicas.model_copy(update={"min_replicas": min_replicas, "max_replicas": max_replicas})
        return replace(self, args=self.args.model_copy(update={"replicas": replicas}))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return {"args": self.args.model_dump(), "previous": [version.model_dump() for version in self.previous]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Deployed:
        """Read what `to_json` wrote. Raises `ValueError` or `KeyError` for anything else."""
        return cls(
            args=TaskArgs.model_validate(data["args"]),
            previous=tuple(VersionArgs.model_validate(version) for version in data["previous"]),
        )


@dataclass(kw_only=True, slots=True)
class Deployments:
    """All tasks that are to be served, by name."""

    tasks: dict[str, Deployed] = field(default_factory=dict)

    def one(self, task: str) -> Deployed:
        """Raises `NotPublishedError` with the known ones."""
        if task not in self.tasks:
            known = ", ".join(sorted(self.tasks)) or "(none)"
            raise NotPublishedError(f"task {task!r} is not served; served: {known}. deploy.py up {task} serves it")
        return self.tasks[task]


class DeploymentsFile:
    """The file, and its lock: one command changes it at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Deployments:
        """What is in it; nothing where there is no file. Raises `CheckpointError` for a file that is something else."""
        try:
            found = json.loads(self.path.read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}, this program reads {FORMAT}")
            return Deployments(tasks={name: Deployed.from_json(one) for name, one in found["tasks"].items()})
        except FileNotFoundError:
            return Deployments()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.path} does not say what is served ({reason}): put it back, or remove it and deploy anew"
            ) from error

    def write(self, deployments: Deployments) -> None:
        """All of it, or none. Only the holder of `locked` may."""
        tasks = {name: one.to_json() for name, one in sorted(deployments.tasks.items())}
        write_atomically(self.path, (json.dumps({"format": FORMAT, "tasks": tasks}, indent=2) + "\n").encode())

    @contextmanager
    def locked(self) -> Iterator[Deployments]:
        """What is in it, for one command to change and `write`. Raises `UnavailableError` while another one does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout as error:
            raise UnavailableError(f"another deploy.py is at work ({lock.lock_file}): wait for it to end") from error
        try:
            yield self.read()
        finally:
            lock.release()
