"""Faults at exact points of a run. A copy of this file is the `sitecustomize` of every process of the run.

Beside the copy lie

    plan.json   what is to happen: a list of strikes, one after the other
    struck-N    made when the N-th happened, by the one process that it happened in
    driver      the process id of the command
    server      that of the tracking server; it leads a process group
    server-up   the tracking server is back

A strike is ``{"point": one of POINTS, "do": one of _ACTIONS, "step": int?, "task": str?, "rank": int?}``. Without a
plan nothing happens. The program knows nothing of this file: its functions are wrapped as their modules are imported.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
_PATIENCE_S: Final = 300.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """Before a function of the program begins, after it has ended, or inside: when half of a file is written."""

    module: str
    function: str
    moment: str
    step: Callable[..., int | None] = lambda *_: None
    """Of the call's arguments."""
    task: Callable[..., str | None] = lambda *_: None


def _of_checkpoint(part: str) -> Callable[..., int | None]:
    """The step of a checkpoint file of that part of a run; -1 for any other file."""

    def step(path: Path, *_: Any) -> int:
        mine = path.parent.name == part and path.name.startswith("step-")
        return int(path.name.removeprefix("step-")) if mine else -1

    return step


def _training(function: str, moment: str) -> Point:
    module = "orchestrator.encoder_training"
    return Point(module=module, function=f"EncoderTraining.{function}", moment=moment, step=lambda self, *_: self.step)


def _producer(function: str, moment: str, **where: Any) -> Point:
    return Point(module="orchestrator.producer", function=f"Producer.{function}", moment=moment, **where)


def _consumer(function: str, moment: str, **where: Any) -> Point:
    function = f"Consumer.{function}"
    return Point(
        module="orchestrator.consumer", function=function, moment=moment, task=lambda self, *_: self.task, **where
    )


def _checkpoint(part: str) -> Point:
    module = "orchestrator.checkpoint"
    return Point(module=module, function="write_atomically", moment="inside", step=_of_checkpoint(part))


def _catalog(function: str, moment: str) -> Point:
    return Point(module="orchestrator.catalog", function=f"Catalog.{function}", moment=moment)


def _files(function: str, moment: str) -> Point:
    return Point(module="orchestrator.catalog_files", function=function, moment=moment)


POINTS: Final = {
    "training forward": _training("_forward", "after"),
    # Charged in the ledger and counted, but not applied.
    "training backward": Point(
        module="orchestrator.privacy.plan",
        function="SeededPrivateStep._account",
        moment="after",
        step=lambda self: self._taken,
    ),
    "training result": _training("result", "before"),
    "encoder checkpoint": _checkpoint("encoder"),
    "modules checkpoint": _checkpoint("modules"),
    "session checkpoint": _checkpoint("session"),
    "producer forward": _producer("features", "after", step=lambda self, step: step),
    "producer backward": _producer("learn", "after", step=lambda self, step, *_: step),
    "producer state": _producer(
        "state_dict", "before", step=lambda self: 0 if self._last is None else self._last.step + 1
    ),
    "producer weights": _producer("weights", "before"),
    "consumer forward": _consumer("learn", "before", step=lambda self, batch: batch.step),
    "consumer backward": _consumer("learn", "after", step=lambda self, batch: batch.step),
    "consumer state": _consumer("state_dict", "before", step=lambda self: self._last_step + 1),
    "consumer head": _consumer("head", "before"),
    "before the encoder": _catalog("publish_encoder", "before"),
    "after the encoder": _catalog("publish_encoder", "after"),
    "before the tasks": _catalog("publish_tasks", "before"),
    "after the tasks": _catalog("publish_tasks", "after"),
    # All files are there, and nothing points to them.
    "after the upload": _files("PublicationFiles.upload", "after"),
    "draft": _files("Draft.add", "before"),
    "upload": Point(module="mlflow.tracking.client", function="MlflowClient.log_artifacts", moment="before"),
    "feature cache": Point(module="orchestrator.feature_cache", function="_write", moment="before"),
    "charge": Point(
        module="orchestrator.privacy.ledger",
        function="Ledger.charge",
        moment="before",
        step=lambda self, reservation, step: step,
    ),
}

# -- what happens ------------------------------------------------------------------------------------------------------


def _kill(*_: Any) -> None:
    """This process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_driver(*_: Any) -> None:
    os.kill(_pid("driver"), signal.SIGKILL)


def _kill_all(*_: Any) -> None:
    """The command and every process that it started, this one last."""
    import psutil

    driver = psutil.Process(_pid("driver"))
    for process in (driver, *driver.children(recursive=True)):
        if process.pid != os.getpid():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    _kill()


def _kill_server(*_: Any) -> None:
    os.killpg(_pid("server"), signal.SIGKILL)


def _wait_for_server(*_: Any) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not (HERE / "server-up").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def _fill_disk(*arguments: Any) -> None:
    path = next((str(a) for a in arguments if isinstance(a, Path)), None)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _fill_ledgers_disk(ledger: Any, *_: Any) -> None:
    ledger._db = _FullDisk(ledger._db)


class _FullDisk:
    """A connection to an SQLite file that cannot grow: what was written is refused when it is to last."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


_ACTIONS: Final[dict[str, Callable[..., None]]] = {
    "kill": _kill,
    "kill driver": _kill_driver,
    "kill all": _kill_all,
    "kill server": _kill_server,
    "wait for server": _wait_for_server,
    "disk full": _fill_disk,
    "disk full from then on": _fill_disk,
    "ledger full": _fill_ledgers_disk,
}


def _pid(name: str) -> int:
    return int((HERE / name).read_text())


# -- when it happens ---------------------------------------------------------------------------------------------------


def _strike(name: str, arguments: tuple[Any, ...]) -> None:
    """Do what the plan says, if it is about this call and its time has come."""
    try:
        plan = json.loads((HERE / "plan.json").read_text())
    except FileNotFoundError:
        return
    for n, strike in enumerate(plan):
        if strike["point"] == name and _is_meant(strike, POINTS[name], arguments) and _is_next(n, strike["do"]):
            _ACTIONS[strike["do"]](*arguments)


def _is_meant(strike: dict[str, Any], point: Point, arguments: tuple[Any, ...]) -> bool:
    if "task" in strike and point.task(*arguments) != strike["task"]:
        return False
    if "rank" in strike and _rank() != strike["rank"]:
        return False
    if "step" not in strike:
        return True
    step = point.step(*arguments)
    return step is not None and (step == strike["step"] or (_lasts(strike["do"]) and step > strike["step"]))


def _is_next(n: int, do: str) -> bool:
    """Whether all strikes before this one happened, and this one did not, unless it is one that lasts."""
    if n and not (HERE / f"struck-{n - 1}").exists():
        return False
    try:
        os.close(os.open(HERE / f"struck-{n}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return _lasts(do)
    return True


def _lasts(do: str) -> bool:
    return do.endswith("from then on")


def _rank() -> int:
    """Of this process among the workers of a distributed training; 0 outside of one."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    return distributed.get_rank() if distributed is not None and distributed.is_initialized() else 0


# -- where it is hooked in ---------------------------------------------------------------------------------------------


def _wrapped(name: str, point: Point, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if point.moment == "before":
            _strike(name, arguments)
        if point.moment == "inside":
            path, data = arguments
            step = point.step(path)
            if step is not None and step >= 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                half = path.with_name(f".{path.name}.half.tmp")
                half.write_bytes(data[: len(data) // 2])
                try:
                    _strike(name, arguments)
                finally:
                    half.unlink(missing_ok=True)
        result = function(*arguments, **named)
        if point.moment == "after":
            _strike(name, arguments)
        return result

    return call


def _wrap(module: Any) -> None:
    for name, point in POINTS.items():
        if point.module != module.__name__:
            continue
        *owners, last = point.function.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, last, _wrapped(name, point, getattr(owner, last)))


class _Finder(MetaPathFinder):
    """Finds the modules that the points are in, as the path-based finder does, and wraps what is in them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in {point.module for point in POINTS.values()}:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _wrap(module)

            loader.exec_module = exec_module
        return spec


if Path(__file__).name == "sitecustomize.py":
    sys.meta_path.insert(0, _Finder())
