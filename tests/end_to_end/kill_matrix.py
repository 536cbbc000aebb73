#!/usr/bin/env python3
"""The kill matrix: {driver, producer, consumer k, Ray Train worker, cluster, tracker, disk, remote tenant} x {forward,
backward, checkpoint, publish}.

Every cell is a whole run of `pipelines/train.py` (or `add_task.py`) in a storage folder of its own, with strikes at
exact points of it (`faults.py`). Its end is compared with that of the undisturbed run: final losses and test metrics to
1e-6, weights, what was published, the guarantee's epsilon, the ledger's, and the steps charged.

who                 forward                 backward                checkpoint              publish
driver              a worker, then the      a step is charged,      half of a file is       before, between and after
                    producer, is in step 4  then one applied, and   written in phase 1,     the writes of the encoder,
                    while it dies           nobody answers          then in phase 2         then of the tasks
producer, consumer  dies in step 4          step 4 is applied, the  while its state is      while it hands over what
                                            answer is lost          collected               will be published
train worker        dies in step 4          charged, not applied    half a file is written  done, and nobody told
cluster             the producer is in      a step is charged and   half a file is written  between the writes of the
                    step 4                  not applied, phase 1    in phase 2              encoder
tracker             dies in phase 1, and is back before anything    dies and stays away: the command ends with an
                    is published                                    error, and publishes when it is resumed
disk full           the feature cache       the ledger cannot       from step 6 on no file  neither a draft nor an
                    cannot be written       write the charge        can be written          upload can be written
add_task driver     as the driver, with a module under DP
remote tenant       as a consumer, in a process behind HTTP that is started      dies when it is told that all is
                    again by somebody else                                       published
its driver          in step 4               step 4 is applied       as the driver           as the driver

The driver and the cluster (every process of the run, Ray's own too) need --resume. Parties that die are replaced
without the command ending. A disk that is full in forward, backward or publish ends the command with an error, and it
goes on when resumed. A producer and consumers have ended when their weights are published, so for them publish is the
hand-over; a consumer writes no file. Two train workers round their sums otherwise than one, so their rows are compared
with the undisturbed run of two.

Rows join a Ray cluster that outlives them, so that a driver's death is not the workers', but for those of the cluster,
and those in which only the driver takes part: these run in one process, whose undisturbed run is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from matrix_cells import PHASES, Cell, cells
from matrix_runs import BrokenError, End, Matrix

from orchestrator.errors import MetaMorphosisError

TOLERANCE: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    who: str
    when: str
    struck: int
    starts: int
    loss_difference: float = float("nan")
    weight_difference: float = float("nan")
    epsilon: float = float("nan")
    ledger_epsilon: float = float("nan")
    charged: str = ""
    wall_s: float = 0.0
    complaint: str = ""
    """Empty if the row is equal to the undisturbed run."""


def run(chosen: Sequence[Cell], folder: Path, *, keep: bool = False) -> Iterator[Row]:
    """The rows of some cells, each as soon as it is there. Raises `BrokenError` if an undisturbed run fails."""
    matrix = Matrix(folder, keep=keep)
    try:
        for cell in chosen:
            yield _row(matrix, cell)
    finally:
        matrix.close()


def _row(matrix: Matrix, cell: Cell) -> Row:
    reference = matrix.reference(cell.command, cell.workers)
    began = time.monotonic()
    facts: dict[str, Any] = {}
    try:
        facts, complaint = _compare(matrix.run(cell), reference)
    except (BrokenError, MetaMorphosisError) as error:
        complaint = str(error)
    return Row(
        who=cell.who,
        when=cell.when,
        struck=matrix.struck(),
        starts=len(cell.ends),
        wall_s=time.monotonic() - began,
        complaint=complaint,
        **facts,
    )


def _compare(end: End, reference: End) -> tuple[dict[str, Any], str]:
    """What the table says of a row, and what is not equal."""
    complaints = []
    for what in ("losses", "metrics", "epsilon", "charged", "weights"):
        mine, theirs = getattr(end, what), getattr(reference, what)
        if mine.keys() != theirs.keys():
            complaints.append(f"{what} of {sorted(mine)}, not of {sorted(theirs)}")
    if complaints:
        return {}, "; ".join(complaints)
    loss = max(abs(end.losses[t] - reference.losses[t]) for t in reference.losses)
    metric = max(abs(end.metrics[t][m] - v) for t, values in reference.metrics.items() for m, v in values.items())
    weight = max(float((end.weights[p] - w).abs().max()) for p, w in reference.weights.items())
    if not max(loss, metric) <= TOLERANCE:
        complaints.append(f"losses differ by {loss:.2g}, metrics by {metric:.2g}")
    if end.epsilon != reference.epsilon:
        complaints.append(f"epsilon is {end.epsilon}, not {reference.epsilon}")
    if end.charged != reference.charged or end.ledger_epsilon != reference.ledger_epsilon:
        complaints.append(f"the ledger has {end.charged}, not {reference.charged}")
    facts = {
        "loss_difference": loss,
        "weight_difference": weight,
        "epsilon": max(e for e in end.epsilon.values() if e is not None),
        "ledger_epsilon": end.ledger_epsilon,
        "charged": ", ".join(f"{part} {steps}" for part, (steps, *_) in end.charged.items()),
    }
    return facts, "; ".join(complaints)


def show(rows: Sequence[Row], *, wall_s: float) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The kill matrix, each row against the undisturbed run", title_justify="left")
    for name in ("who", "when"):
        table.add_column(name)
    for name in ("strikes", "starts", "loss off by", "weights off by", "epsilon", "ledger"):
        table.add_column(name, justify="right")
    for name in ("steps charged", "result"):
        table.add_column(name)
    for row in rows:
        numbers = (f"{row.loss_difference:.1g}", f"{row.weight_difference:.1g}")
        epsilons = (f"{row.epsilon:.4f}", f"{row.ledger_epsilon:.4f}")
        result = row.complaint or "equal"
        table.add_row(row.who, row.when, str(row.struck), str(row.starts), *numbers, *epsilons, row.charged, result)
    equal = sum(not row.complaint for row in rows)
    console = Console(width=160, highlight=False)
    console.print(table)
    console.print(f"{equal} of {len(rows)} rows are equal to the undisturbed run, in {wall_s / 60:.1f} minutes")


def _chosen(who: str | None, when: str | None) -> list[Cell]:
    """The cells of some rows and columns. Exits if there is no such name."""
    chosen = cells()
    for wanted, names, part in ((who, {c.who for c in chosen}, "who"), (when, set(PHASES), "when")):
        if wanted is None:
            continue
        given = {name.strip() for name in wanted.split(",")}
        if unknown := given - names:
            raise SystemExit(f"no {part} {sorted(unknown)}; known: {', '.join(sorted(names))}")
        chosen = [cell for cell in chosen if getattr(cell, part) in given]
    return chosen


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", help="only these rows, as A,B")
    parser.add_argument("--when", help="only these columns, as A,B")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument(
        "--keep", type=Path, help="keep every run in this folder; undisturbed runs found there are not repeated"
    )
    arguments = parser.parse_args()
    chosen = _chosen(arguments.who, arguments.when)
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as temporary:
        folder = (arguments.keep or Path(temporary)).absolute()
        for row in run(chosen, folder, keep=arguments.keep is not None):
            rows.append(row)
            result = row.complaint or "equal"
            sys.stderr.write(f"{len(rows)}/{len(chosen)} {row.who}, {row.when}: {result} ({row.wall_s:.0f} s)\n")
    show(rows, wall_s=time.monotonic() - began)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0 if rows and not any(row.complaint for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
