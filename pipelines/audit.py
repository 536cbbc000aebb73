#!/usr/bin/env python3
"""Try out what the privacy guarantees say, on the code that trains. See ``--help``."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.command import main, open_console

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.evaluation.audit.report import AuditReport, Runner
    from orchestrator.settings.audit import AuditSettings

_WIDTH = 150
_MOST_PROCESSES = 8
"""By default: each holds PyTorch in memory."""


def run(settings: AuditSettings) -> None:
    """Audit, print the table, and fail if something is not as it should be."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orchestrator.checkpoint import write_atomically
    from orchestrator.errors import AuditError
    from orchestrator.evaluation.audit.report import audit

    console = open_console(width=_WIDTH)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar, _runner(settings.processes) as runner:
        shown = bar.add_task("calibrating", total=None)
        report = audit(
            settings.modes,  # type: ignore[arg-type]  # the settings know that they are modes
            epsilon=settings.epsilon,
            runs=settings.runs,
            confidence=settings.confidence,
            seed=settings.seed,
            run=runner,
            progress=lambda done, total, name: bar.update(shown, description=name, completed=done, total=total),
        )
    console.print(_table(report))
    console.print(_legend(report))
    if settings.out is not None:
        write_atomically(settings.out, (json.dumps(report.to_json(), indent=2) + "\n").encode())
        console.print(f"Numbers  {settings.out}")
    if report.surprises:
        raise AuditError("; ".join(row.surprise for row in report.surprises))
    console.print("Every claim holds, and every planted fault was seen.")


def _table(report: AuditReport) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What is claimed, and what an attacker showed", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("mode", "fault"):
        table.add_column(name, no_wrap=True)
    for name in ("claimed\nepsilon", "at least\nlost", "TPR", "FPR"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in report.rows:
        table.add_row(
            *(row.mode, row.fault or "-", f"{row.claim:.2f}", f"{row.bound.epsilon:.2f}"),
            *(f"{row.bound.tpr:.3f}", f"{row.bound.fpr:.3f}"),
            Text(row.verdict, style="" if row.as_expected else "bold red"),
        )
    return table


def _legend(report: AuditReport) -> str:
    delta = report.rows[0].delta
    return (
        f"at least lost: a lower bound on epsilon at delta {delta:g}, with confidence {report.confidence:g}, from "
        f"{report.runs} trainings with a canary and {report.runs} without. Half of them chose the attacker's "
        f"threshold; TPR and FPR are those of the other half. So many can show at most {report.largest:.2f}. "
        "A bound under the claim does not prove the claim; one above it refutes it."
    )


@contextmanager
def _runner(processes: int | None) -> Iterator[Runner]:
    """`map` over so many processes of one thread each; over this one, for one."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import torch

    wanted = processes or min(_MOST_PROCESSES, os.cpu_count() or 1)
    if wanted == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield map
        finally:
            torch.set_num_threads(before)
        return
    # A forked process would inherit PyTorch's threads half alive.
    pool = ProcessPoolExecutor(wanted, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Of a process of the pool: Ctrl-C is for the command, which ends the pool."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


if __name__ == "__main__":
    main("orchestrator.settings.audit:AuditSettings", run, prog="audit.py")
