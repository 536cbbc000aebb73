"""Runs, parameters, metrics and figures in MLflow, at no risk to the training that they describe.

Opening a tracker may fail, at once and with advice. After that nothing that goes wrong with MLflow raises or waits:

    log_*  ->  queue (bounded)  ->  one daemon thread  ->  MLflow
                 | full                | refused, or unsent at the end
                 +----->  spool/<run id>/unsent.jsonl  <-----+
"""

from __future__ import annotations

import json
import logging
import math
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UnavailableError
from orchestrator.mlflow_store import (
    check_reachable,
    masked,
    open_client,
    open_experiment,
    sqlite_path,
    store_errors,
    store_uri,
)
from orchestrator.tracking_records import Record, Spool, send

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

__all__ = ["Tracker", "check_reachable", "open_tracker"]

logger = logging.getLogger(__name__)

_CAPACITY = 10_000
"""Records that may wait. An epoch makes a handful, so this is days of a server's absence."""
_RETRY_S = 5.0
_ATTEMPTS = 3
"""Of a record that a reachable server refuses; while the server is away, the record waits."""


def open_tracker(
    uri: str,
    *,
    experiment: str,
    run_name: str,
    parent_run_id: str | None = None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    spool: Path | None = None,
) -> Tracker:
    """Start a run. ``spool`` keeps what could not be sent; by default it is beside a SQLite file, or in /tmp.

    Raises `ConfigError` for a URI of no use, and `UnavailableError` within seconds if the store does not answer.
    """
    uri = store_uri(uri)
    client = open_client(uri)
    experiment_id = open_experiment(client, uri, experiment)
    all_tags = {name: str(value) for name, value in tags.items()}
    if parent_run_id is not None:
        all_tags["mlflow.parentRunId"] = parent_run_id
    with store_errors(uri):
        run = client.create_run(experiment_id, run_name=run_name, tags=all_tags)
    database = sqlite_path(uri)
    beside = Path(tempfile.gettempdir()) / "metamorphosis-spool" if database is None else database.parent / "spool"
    tracker = Tracker(client, uri=uri, experiment_id=experiment_id, run_id=run.info.run_id, spool=spool or beside)
    tracker.log_params(params)
    return tracker


class Tracker:
    """One run. Made by `open_tracker`; ended by `finish`, which must be called.

    Every method may be called from any thread, and returns at once. Metrics that are not finite are left out, counted,
    and named in the run's tags: neither MLflow's tables nor its plots can hold them.
    """

    def __init__(
        self,
        client: MlflowClient,
        *,
        uri: str,
        experiment_id: str,
        run_id: str,
        spool: Path,
        capacity: int = _CAPACITY,
        retry_s: float = _RETRY_S,
    ) -> None:
        self.run_id = run_id
        self._client, self._uri, self._experiment_id, self._retry_s = client, uri, experiment_id, retry_s
        self._spool = Spool(spool / run_id, run_id=run_id)
        self._queue: queue.Queue[Record | None] = queue.Queue(maxsize=capacity)
        self._lock = threading.Lock()
        self._current: Record | None = None
        self._abandoned = False
        self._away = False
        self._closing = threading.Event()
        self._not_finite: dict[str, int] = {}
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._serve, name=f"tracker-{run_id[:8]}", daemon=True)
        self._thread.start()

    @property
    def run_url(self) -> str:
        """Where a person finds the run."""
        if self._uri.startswith("http"):
            return f"{masked(self._uri)}/#/experiments/{self._experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {masked(self._uri)}  (run {self.run_id})"

    # -- what a run tells ----------------------------------------------------------------------------------------------

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, at one step."""
        with self._harmless():
            numbers = {name: float(value) for name, value in values.items()}
            finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
            for name in numbers.keys() - finite.keys():
                if name not in self._not_finite:
                    self.set_tags({f"not_finite.{name}": f"{numbers[name]}, first at step {step}"})
                self._not_finite[name] = self._not_finite.get(name, 0) + 1
            if finite:
                self._put(Record(kind="metrics", content={"step": int(step), "time_ms": _now_ms(), "values": finite}))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings by name. A setting cannot be changed afterwards."""
        with self._harmless():
            if params:
                self._put(Record(kind="params", content={name: str(value) for name, value in params.items()}))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Text by name; a later value takes the place of an earlier one."""
        with self._harmless():
            if tags:
                self._put(Record(kind="tags", content={name: str(value) for name, value in tags.items()}))

    def log_figure(self, figure: Figure, name: str) -> None:
        """A figure as it is now, under a name whose ending is the format: ``training.png``."""
        self._log_artifact(name, lambda path: figure.savefig(path))  # noqa: PLW0108 - a broken figure fails inside

    def log_file(self, path: Path, artifact_dir: str = "") -> None:
        """A copy of a file as it is now, in a folder of the run's artefacts."""
        self._log_artifact(f"{artifact_dir}/{Path(path).name}", lambda copy: shutil.copyfile(path, copy))

    def log_text(self, text: str, name: str) -> None:
        """A text file."""
        self._log_artifact(name, lambda path: path.write_text(text, encoding="utf-8"))

    def log_json(self, data: Any, name: str) -> None:
        """A JSON file."""
        self._log_artifact(name, lambda path: path.write_text(json.dumps(data, indent=2), encoding="utf-8"))

    def finish(self, status: str = "FINISHED", *, timeout_s: float = 20.0) -> int:
        """End the run as FINISHED, FAILED or KILLED. Returns how many records did not reach MLflow; the spool has them.

        Waits at most about ``timeout_s`` for the records still in the queue. A second call changes nothing.
        """
        with self._harmless():
            if not self._closing.is_set():
                if self._not_finite:
                    self.set_tags({"not_finite_metrics": sum(self._not_finite.values())})
                self._put(Record(kind="status", content={"status": status, "time_ms": _now_ms()}))
                self._closing.set()
                with suppress(queue.Full):
                    self._queue.put_nowait(None)
                self._thread.join(timeout_s)
                self._abandon()
                self._spool.remove_if_empty()
                if self._spool.unsent:
                    logger.warning("%d records were not sent to MLflow: %s", self._spool.unsent, self._spool.folder)
        return self._spool.unsent

    # -- in the caller's thread ----------------------------------------------------------------------------------------

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Whatever goes wrong inside is a lost record and a warning, not an exception."""
        try:
            yield
        except Exception as error:
            self._warn("a record could not be made", error)
            self._spool.count_lost()

    def _put(self, record: Record) -> None:
        if self._closing.is_set():
            self._keep(record)
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._keep(record)

    def _log_artifact(self, name: str, write: Callable[[Path], object]) -> None:
        with self._harmless():
            self._put(self._spool.stage(name, write))

    def _abandon(self) -> None:
        """Put what is still waiting into the spool. What is on its way at this moment may arrive all the same."""
        with self._lock:
            waiting, self._current, self._abandoned = [self._current], None, True
        with suppress(queue.Empty):
            while True:
                waiting.append(self._queue.get_nowait())
        for record in waiting:
            if record is not None:
                self._keep(record)

    # -- in the tracker's thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            record = self._queue.get()
            if record is None:
                return
            with self._lock:
                late, self._current = self._abandoned, record
            sent = not late and self._deliver(record)
            with self._lock:
                mine, self._current = self._current is record, None
            if mine and not sent:
                self._keep(record)

    def _deliver(self, record: Record) -> bool:
        """Whether MLflow has it. Tries for as long as the server is away and the run goes on."""
        refusals = 0
        while not (self._closing.is_set() and self._away):
            try:
                send(self._client, self.run_id, record)
            except Exception as error:
                self._warn("MLflow does not take what is logged", error)
                self._away = not self._reachable()
                refusals += not self._away
                if refusals >= _ATTEMPTS or self._closing.is_set():
                    return False
                self._closing.wait(self._retry_s)
            else:
                self._away = False
                return True
        return False

    def _reachable(self) -> bool:
        try:
            check_reachable(self._uri)
        except UnavailableError:
            return False
        return True

    # -- in either -----------------------------------------------------------------------------------------------------

    def _keep(self, record: Record) -> None:
        try:
            self._spool.keep(record)
        except Exception as error:
            self._warn("not even the spool takes what is logged", error)

    def _warn(self, what: str, error: Exception) -> None:
        """Once for each kind of mishap: a training of days must not drown in them."""
        if what not in self._warned:
            self._warned.add(what)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            where = (masked(self._uri), reason, self._spool.folder)
            logger.warning(f"{what} (%s: %s). Training goes on; records wait, or are kept in %s. Said once.", *where)


def _now_ms() -> int:
    return int(time.time() * 1000)
