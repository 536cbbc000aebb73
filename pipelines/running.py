"""What a command that trains or evaluates stands on: a cluster, a catalog, a tracker and a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from orchestrator.catalog import Catalog
from orchestrator.cluster import ray_cluster
from orchestrator.runs.history import History
from orchestrator.runs.observer import Observers
from orchestrator.settings.shared import RuntimeSettings
from orchestrator.tracking import Tracker, check_reachable, open_tracker
from pipelines.command import open_console
from pipelines.progress import TerminalObserver

_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Running:
    """What a command's body works with."""

    catalog: Catalog
    tracker: Tracker
    history: History
    observer: Observers
    terminal: TerminalObserver
    console: Console


@contextmanager
def running(
    runtime: RuntimeSettings, *, catalog: str, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Running]:
    """Open everything, and close it in the right order whatever happens.

    The tracking server is tried first: an hour of training should not end with nowhere to publish.
    """
    console = open_console(width=_WIDTH)
    runtime.storage_path.mkdir(parents=True, exist_ok=True)
    check_reachable(runtime.tracking)
    tracker = open_tracker(
        runtime.tracking,
        experiment=f"metamorphosis-{catalog}",
        run_name=run_name,
        params=params,
        tags=tags,
        spool=runtime.storage_path / "spool",
    )
    status = "FAILED"
    try:
        terminal = TerminalObserver(console)
        history = History(tracker)
        cluster = ray_cluster(runtime.address) if runtime.engine == "ray" else nullcontext()
        with terminal.showing(), cluster:
            yield Running(
                catalog=Catalog(runtime.tracking, catalog),
                tracker=tracker,
                history=history,
                observer=Observers(terminal, history),
                terminal=terminal,
                console=console,
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        unsent = tracker.finish(status)
        if unsent:
            console.print(
                f"[yellow]{unsent} records could not be sent to {runtime.tracking}; they are kept in "
                f"{runtime.storage_path / 'spool'}[/yellow]"
            )


def catalog_name(runtime: RuntimeSettings, data: str) -> str:
    """``--catalog``, or the data set's own name: ``digits``, or the parquet file's."""
    if runtime.catalog is not None:
        return runtime.catalog
    from pathlib import Path

    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(data.split(":", 1)[-1]).stem).strip("-")
    return stem[:63] or "unnamed"


def published_catalog(runtime: RuntimeSettings, data: str | None) -> str:
    """The catalog that a command on a published encoder means: the named one, the data's, or the only one there is."""
    from orchestrator.catalog import catalogs
    from orchestrator.errors import NotPublishedError

    if runtime.catalog is not None or data is not None:
        return catalog_name(runtime, data or "")
    check_reachable(runtime.tracking)
    known = catalogs(runtime.tracking)
    if len(known) != 1:
        raise NotPublishedError(
            f"there are {len(known)} catalogs at {runtime.tracking} ({', '.join(known) or 'none'}): "
            + ("name one with --catalog" if known else "train an encoder first with pipelines/train.py")
        )
    return str(known[0])
