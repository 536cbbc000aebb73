"""A sweep as tables: for the terminal, as Markdown, and for the page."""

from __future__ import annotations

import math

from orchestrator.report.sheet import NOT_MEASURED, Mark, Sheet, percent
from orchestrator.sweep.objectives import OBJECTIVES, Objective
from orchestrator.sweep.records import Trial
from orchestrator.sweep.result import Configuration, Result
from orchestrator.sweep.space import shown

_PARAMETERS = ("split_index", "epsilon", "omega", "feature_bits")
_NAMES = {"split_index": "split", "feature_bits": "bits"}


def front_sheet(result: Result) -> Sheet:
    """The front: what may be chosen, and what each choice is worth."""
    measures = _measures(result)
    parameters = _parameters(result)
    rows = [
        [
            *(shown(getattr(c.point, name)) for name in parameters),
            *(_with_spread(c, objective) for objective in measures),
            percent(c.utility_on_test),
            ", ".join(o.name for o in result.objectives if (b := result.best(o)) is not None and b.key == c.key),
        ]
        for c in result.front
    ]
    seeds = len(result.front[0].trials) if result.front else 1
    of = "one seed" if seeds == 1 else f"the mean of {seeds} seeds, with half of their spread"
    return Sheet(
        title=f"What no other choice beats in {', '.join(o.name for o in result.objectives)}",
        names=[*(_NAMES.get(n, n) for n in parameters), *(o.title for o in measures), "test utility, %", "best in"],
        rows=rows,
        words=frozenset({"best in"}),
        note=f"{len(result.front)} of {len(result.configurations)} configurations, {of}. utility: mean accuracy of the "
        "sold tasks; excess leakage: the worst over features and targets of the best of the quick attackers, above "
        "what needs no feature. Both on the validation subset, which is what was chosen by; test utility is on images "
        "that no choice has seen.",
    )


def trials_sheet(result: Result) -> Sheet:
    """Every trial."""
    measures, parameters = _measures(result), _parameters(result)
    front = {c.key for c in result.front}
    rows, marks = [], []
    for trial in result.trials:
        rows.append(
            [
                *(shown(getattr(trial.point, name)) for name in parameters),
                str(trial.point.seed),
                *(objective.shown(trial.values.get(objective.name)) for objective in measures),
                "yes" if trial.status == "done" and trial.point.configuration in front else "",
                ", ".join(trial.reused) or NOT_MEASURED,
                trial.problem or trial.status,
            ]
        )
        marks.append(_mark(trial))
    return Sheet(
        title="Every trial",
        names=[*(_NAMES.get(n, n) for n in parameters), "seed", *(o.title for o in measures), "front", "reused", "how"],
        rows=rows,
        marks=marks,
        words=frozenset({"reused", "how", "front"}),
    )


def _mark(trial: Trial) -> Mark:
    return "crashed" if trial.status == "failed" else ""


def _measures(result: Result) -> list[Objective]:
    """All that was measured, what counts first."""
    known = {name for trial in result.trials for name in trial.values}
    rest = [o for name, o in OBJECTIVES.items() if name in known and o not in result.objectives]
    return [*(o for o in result.objectives if o.name != "epsilon"), *(o for o in rest if o.name != "epsilon")]


def _parameters(result: Result) -> list[str]:
    swept = {dimension.name for dimension in result.space.swept}
    return [name for name in _PARAMETERS if name in swept or name in ("split_index", "epsilon", "omega")]


def _with_spread(configuration: Configuration, objective: Objective) -> str:
    value = configuration.mean(objective.name)
    low, high = configuration.spread(objective.name)
    told = objective.shown(value)
    if len(configuration.trials) == 1 or not math.isfinite(high - low) or high == low:
        return told
    return f"{told} ±{objective.shown((high - low) / 2)}"
