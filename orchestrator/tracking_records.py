"""What a tracker tells MLflow, one record at a time, and where records are kept that could not be told."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
"""MLflow's own limits, for tags too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One thing to tell MLflow, ready for JSON."""

    kind: Literal["metrics", "params", "tags", "artifact", "status"]
    content: Mapping[str, Any]
    file: Path | None = None
    """The spool's own copy of an artefact."""


def send(client: MlflowClient, run_id: str, record: Record) -> None:
    """Tell MLflow. Raises whatever MLflow raises."""
    from mlflow.entities import Metric, Param, RunTag

    content = record.content
    match record.kind:
        case "metrics":
            time_ms, step = content["time_ms"], content["step"]
            metrics = [Metric(metric_name(name), value, time_ms, step) for name, value in content["values"].items()]
            for some in _in_parts(metrics, _METRICS_PER_CALL):
                client.log_batch(run_id, metrics=some)
        case "params":
            for some in _in_parts([Param(name, value) for name, value in content.items()], _PARAMS_PER_CALL):
                client.log_batch(run_id, params=some)
        case "tags":
            for some in _in_parts([RunTag(name, value) for name, value in content.items()], _PARAMS_PER_CALL):
                client.log_batch(run_id, tags=some)
        case "artifact":
            assert record.file is not None
            client.log_artifact(run_id, str(record.file), content["folder"] or None)
            shutil.rmtree(record.file.parent, ignore_errors=True)
        case "status":
            client.set_terminated(run_id, content["status"], content["time_ms"])


def metric_name(name: str) -> str:
    """The name with ``_`` for what MLflow does not allow in one: it allows letters, digits and ``_-. :/``."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


class Spool:
    """A folder of one run: copies of artefacts until they are sent, and ``unsent.jsonl``, what was not sent.

    A line is ``{"run_id", "kind", "content"}``, with ``"file"``, the artefact's copy, where the kind is ``artifact``.
    Any thread may use it.
    """

    def __init__(self, folder: Path, *, run_id: str) -> None:
        self.folder, self._run_id = folder, run_id
        self._lock = threading.Lock()
        self._staged = 0
        self.unsent = 0
        """Records that did not reach MLflow."""

    def stage(self, name: str, write: Callable[[Path], object]) -> Record:
        """A copy of an artefact, written by ``write``: its owner may change or delete it before it is sent."""
        folder, _, file_name = name.strip("/").rpartition("/")
        if not file_name or ".." in name.split("/"):
            raise ValueError(f"an artefact cannot be named {name!r}")
        with self._lock:
            self._staged += 1
            path = self.folder / f"{self._staged:04d}" / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return Record(kind="artifact", content={"folder": folder, "name": file_name}, file=path)

    def keep(self, record: Record) -> None:
        """Write it down. Raises `OSError` if even that fails; it is counted all the same."""
        entry: dict[str, Any] = {"run_id": self._run_id, "kind": record.kind, "content": dict(record.content)}
        if record.file is not None:
            entry["file"] = str(record.file)
        with self._lock:
            self.unsent += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "unsent.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def count_lost(self) -> None:
        """A record that could not even be made."""
        with self._lock:
            self.unsent += 1

    def remove_if_empty(self) -> None:
        """Leave nothing behind where everything was sent."""
        if self.unsent == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _in_parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
