"""A leakage report as a table: for the terminal, and as Markdown for documents. Accuracies in %, excess in points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from orchestrator.evaluation.report import CLAIM_MARGIN, AttackSummary, LeakageReport, LeakageRow

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "-"
CRASHED = "crashed"


def leakage_table(report: LeakageReport, *, alone: Mapping[str, float] | None = None) -> Table:
    """A rich table, one row per feature and target.

    ``alone`` is the accuracy of each task's network trained alone without privacy; it gets a column beside the own one.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="What each feature tells",
        caption=legend(report),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    names = header(report, alone)
    for position, name in enumerate(names):
        # Where the terminal is narrow, names of tasks and "(1 crashed)" may wrap; numbers may not.
        numbers = 2 <= position < len(names) - 3 - len(report.budget.attacks) or position >= len(names) - 3
        justify: Literal["left", "right"] = "left" if position < 2 else "right"
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=numbers, overflow="fold")
    starts = [True, *(row.feature != before.feature for before, row in pairwise(report.rows))]
    ends = [*starts[1:], True]
    of_feature = {names.index(name) for name in ("feature", "own", "alone") if name in names}
    for row, cells, first, last in zip(report.rows, body(report, alone), starts, ends, strict=True):
        shown = [cell if first or position not in of_feature else "" for position, cell in enumerate(cells)]
        texts = [Text(cell, style="bold yellow" if CRASHED in cell else "") for cell in shown]
        texts[-1].style = _excess_style(row)
        table.add_row(*texts, end_section=last)
    return table


def leakage_markdown(report: LeakageReport, *, alone: Mapping[str, float] | None = None) -> str:
    """The same rows as a Markdown table, with the legend below."""
    names = header(report, alone)
    rules = ["---", "---", *["---:"] * (len(names) - 2)]
    lines = [f"| {' | '.join(cells)} |" for cells in [names, rules, *body(report, alone)]]
    return "\n".join([*lines, "", legend(report), ""])


def header(report: LeakageReport, alone: Mapping[str, float] | None = None) -> list[str]:
    """Column names. A column per attack, named after it."""
    attacks = [attack.name.replace("_", " ") for attack in report.budget.attacks]
    own = ["own", "alone"] if alone else ["own"]
    return ["feature", "target", *own, "swap", "swap perm", *attacks, "chance", "floor", "excess"]


def body(report: LeakageReport, alone: Mapping[str, float] | None = None) -> list[list[str]]:
    """The cells of every row as text."""
    return [
        [
            row.feature,
            f"{row.target} (private)" if row.target in report.private else row.target,
            percent(report.own.get(row.feature)),
            *([percent(alone.get(row.feature))] if alone else []),
            percent(row.swap),
            percent(row.swap_perm),
            *(attack_cell(summary) for summary in row.attacks),
            percent(row.chance),
            percent(row.floor.accuracy),
            points(row.excess),
        ]
        for row in report.rows
    ]


def legend(report: LeakageReport) -> str:
    """How to read the table, and which rows may be called "at chance"."""
    budget = report.budget
    rows = "rows that the defence never saw" + (" and its training rows" if len(budget.subsets) > 1 else "")
    seeds = "1 seed" if budget.seeds == 1 else f"the mean of {budget.seeds} seeds"
    attacks = ", ".join(attack.name.replace("_", " ") for attack in budget.attacks)
    claims = [f"{row.feature} on {row.target}" for row in report.rows if row.chance_claim_allowed]
    return (
        "Test accuracy in %. own: the task itself. swap: the feature in the target's own head, which says little about "
        f"leakage; swap perm: with its answers renamed. {attacks}: trained afresh on {rows}, {seeds}. "
        "chance: the majority; floor: from the task's own label alone. excess: the best attacker less the larger of "
        f"chance and floor, in points. At chance (95 % bound within {100 * CLAIM_MARGIN:.0f} points): "
        f"{'; '.join(claims) or 'no row'}."
    )


def percent(value: float | None) -> str:
    """``97.4``, or a dash where nothing was measured."""
    return NOT_MEASURED if value is None or math.isnan(value) else f"{100 * value:.1f}"


def points(excess: float | None) -> str:
    """``+12.3``; an excess is missing only where every attack crashed."""
    return CRASHED if excess is None else f"{round(100 * excess, 1) + 0.0:+.1f}"


def attack_cell(summary: AttackSummary) -> str:
    """The mean over the seeds; a crash is said, never averaged away."""
    if not summary.completed:
        return CRASHED
    crashes = f" ({summary.crashed} {CRASHED})" if summary.crashed else ""
    return percent(summary.mean("accuracy")) + crashes


def _excess_style(row: LeakageRow) -> str:
    if row.excess is None:
        return "bold yellow"
    if row.chance_claim_allowed:
        return "green"
    return "bold red" if row.excess > CLAIM_MARGIN else ""
