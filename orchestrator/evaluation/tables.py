"""A leakage report as tables: for the terminal, and as Markdown for documents. Accuracies in %, excess in points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.evaluation.report import CLAIM_MARGIN, AttackSummary, LeakageReport, LeakageRow
from orchestrator.report.sheet import CRASHED, NOT_MEASURED, Mark, Sheet, markdown, percent, terminal

if TYPE_CHECKING:
    from rich.table import Table

_WORDS = frozenset({"feature", "target", "by", "coalition"})
_BOUND_WORDS = {
    "bound": "bound: no attacker is right more often, whoever it is; from the bits of the feature. ",
    "rate bound": "rate bound: the same for images like the test rows, with 95 % confidence; from the bits that were "
    "measured. ",
}
_CONTROL_WORDS = (
    "control: the best of the same attackers on features that were dealt anew among images with the same own label, so "
    "that they tell nothing else: what is above the floor there is luck. "
)


def sheets(report: LeakageReport, *, alone: Mapping[str, float] | None = None) -> list[Sheet]:
    """The leak of every feature, every attacker behind it, and collusion and ceilings where they were measured.

    ``alone`` is the accuracy of each task's network trained alone without privacy; it gets a column beside the own one.
    """
    found = [_leaks(report, alone or {}), _attackers(report)]
    if report.collusion:
        found.append(_collusion(report))
    if report.ceilings:
        found.append(_ceilings(report))
    return found


def leakage_tables(report: LeakageReport, *, alone: Mapping[str, float] | None = None) -> list[Table]:
    """The sheets as rich tables."""
    return [terminal(sheet) for sheet in sheets(report, alone=alone)]


def leakage_markdown(report: LeakageReport, *, alone: Mapping[str, float] | None = None) -> str:
    """The sheets as Markdown tables, each with its legend below."""
    return "\n".join(markdown(sheet) for sheet in sheets(report, alone=alone))


def _leaks(report: LeakageReport, alone: Mapping[str, float]) -> Sheet:
    ceiling = ["ceiling"] if report.ceilings else []
    bound = _bound_names(report.rows)
    control = ["control"] if _has_control(report) else []
    own = ["own", "alone"] if alone else ["own"]
    names = [
        "feature",
        "target",
        *own,
        "swap",
        "swap perm",
        "best",
        "by",
        "bits",
        "chance",
        "floor",
        *control,
        *ceiling,
        *bound,
        "excess",
    ]
    rows = [
        [
            row.feature,
            _target(report, row),
            percent(report.own.get(row.feature)),
            *([percent(alone.get(row.feature))] if alone else []),
            percent(row.swap),
            percent(row.swap_perm),
            *_best(row),
            percent(row.chance),
            percent(row.floor.accuracy),
            *(percent(row.luck) for _ in control),
            *(percent(_ceiling(report, row.target)) for _ in ceiling),
            *(percent(_bound(row, name)) for name in bound),
            points(row.excess),
        ]
        for row in report.rows
    ]
    return Sheet(
        title="What each feature tells",
        names=names,
        rows=rows,
        marks=[_excess_mark(row) for row in report.rows],
        note=legend(report),
        words=_WORDS,
        repeated=frozenset({"feature", "own", "alone"}),
    )


def _attackers(report: LeakageReport) -> Sheet:
    names = ["feature", "target", *(attack.name.replace("_", " ") for attack in report.budget.attacks)]
    return Sheet(
        title="Every attacker",
        names=names,
        rows=[[row.feature, _target(report, row), *map(attack_cell, row.attacks)] for row in report.rows],
        note=_skipped(report.rows),
        words=_WORDS,
        repeated=frozenset({"feature"}),
    )


def _collusion(report: LeakageReport) -> Sheet:
    attacks = [attack.name.replace("_", " ") for attack in report.budget.collusion]
    bound = _bound_names(report.collusion)
    return Sheet(
        title="Two tenants together",
        names=["coalition", "target", "apart", *attacks, "chance", "floor", *bound, "excess"],
        rows=[
            [
                row.feature,
                _target(report, row),
                percent(report.apart(row)),
                *map(attack_cell, row.attacks),
                percent(row.chance),
                percent(row.floor.accuracy),
                *(percent(_bound(row, name)) for name in bound),
                points(row.excess),
            ]
            for row in report.collusion
        ],
        marks=[_excess_mark(row) for row in report.collusion],
        note="Attackers on the two features of the same image together. apart: the best attacker of all on one of them "
        "alone. floor: from the labels of both tasks.",
        words=_WORDS,
        repeated=frozenset({"coalition"}),
    )


def _ceilings(report: LeakageReport) -> Sheet:
    return Sheet(
        title="If nothing were held back",
        names=["target", "chance", "images", "by", "universal"],
        rows=[
            [
                ceiling.target,
                percent(next((row.chance for row in report.rows if row.target == ceiling.target), None)),
                percent(ceiling.images),
                NOT_MEASURED if ceiling.best is None else ceiling.best.attack,
                percent(None if ceiling.best is None else ceiling.best.mean("accuracy")),
            ]
            for ceiling in report.ceilings
        ],
        words=_WORDS,
        note="images: a network trained for the target on the images. universal: the best of the same attackers on the "
        "universal feature, which no tenant receives. An attacker that stays far below them may just be weak.",
    )


def legend(report: LeakageReport) -> str:
    """How to read the first table, and which rows may be called "at chance"."""
    budget = report.budget
    rows = "rows that the defence never saw" + (" and its training rows" if len(budget.subsets) > 1 else "")
    seeds = "1 seed" if budget.seeds == 1 else f"the mean of {budget.seeds} seeds"
    claims = [f"{row.feature} on {row.target}" for row in report.rows if row.chance_claim_allowed]
    ceiling = "ceiling: with nothing held back. " if report.ceilings else ""
    bound = "".join(_BOUND_WORDS[name] for name in _bound_names(report.rows))
    control = _CONTROL_WORDS if _has_control(report) else ""
    return (
        "Test accuracy in %. own: the task itself. swap: the feature in the target's own head, which says little about "
        f"leakage; swap perm: with its answers renamed. best: of the attackers trained afresh on {rows}, {seeds}. "
        "bits: the most that one of them read, of all there are. "
        "chance: a guess, always the commonest class or a drawn one; floor: from the task's own label alone. "
        f"{control}{ceiling}{bound}excess: best less the larger of chance and floor, in points. "
        f"At chance (95 % bound within {100 * CLAIM_MARGIN:.0f} points): "
        f"{'; '.join(claims) or 'no row'}."
    )


def _has_control(report: LeakageReport) -> bool:
    return any(row.control for row in report.rows)


def _bound_names(rows: Sequence[LeakageRow]) -> list[str]:
    """Columns for the kinds of bounds that any row has."""
    return [name for name in _BOUND_WORDS if any(_bound(row, name) is not None for row in rows)]


def _bound(row: LeakageRow, name: str) -> float | None:
    found = row.bound if name == "bound" else row.rate_bound
    return None if found is None else found.accuracy


def points(excess: float | None) -> str:
    """``+12.3``; an excess is missing only where no attacker came through."""
    return CRASHED if excess is None else f"{round(100 * excess, 1) + 0.0:+.1f}"


def attack_cell(summary: AttackSummary) -> str:
    """The mean over the seeds; a crash is said, never averaged away, and an attack that was not run is a dash."""
    if not summary.completed:
        return CRASHED if summary.crashed else NOT_MEASURED
    crashes = f" ({summary.crashed} {CRASHED})" if summary.crashed else ""
    return percent(summary.mean("accuracy")) + crashes


def _best(row: LeakageRow) -> tuple[str, str, str]:
    """The best attacker's accuracy, its name with what crashed beside it, and bits read."""
    crashes = sum(summary.crashed for summary in row.attacks)
    note = f" ({crashes} {CRASHED})" if crashes else ""
    if row.best is None:
        return CRASHED if crashes else NOT_MEASURED, NOT_MEASURED + note, NOT_MEASURED
    bits = row.leak_by("bits")
    read = NOT_MEASURED if bits is None else f"{bits:.2f}/{row.target_bits:.2f}"
    return percent(row.leak), row.best.attack.replace("_", " ") + note, read


def _target(report: LeakageReport, row: LeakageRow) -> str:
    return f"{row.target} (private)" if row.target in report.private else row.target


def _ceiling(report: LeakageReport, target: str) -> float | None:
    ceiling = report.ceiling(target)
    return None if ceiling is None else ceiling.accuracy


def _skipped(rows: Sequence[LeakageRow]) -> str:
    """Why there are dashes, each reason once."""
    reasons = {
        f"{summary.attack.replace('_', ' ')}: {summary.skipped}"
        for row in rows
        for summary in row.attacks
        if summary.skipped is not None
    }
    return f"Not run: {'; '.join(sorted(reasons))}." if reasons else ""


def _excess_mark(row: LeakageRow) -> Mark:
    if row.excess is None:
        return "crashed"
    if row.breaks_bound:
        return "bad"
    if row.chance_claim_allowed:
        return "good"
    return "bad" if row.excess > CLAIM_MARGIN else ""
