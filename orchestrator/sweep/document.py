"""A sweep as a page: what it cost first, then what may be chosen, then every trial and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.evaluation.report import CLAIM_MARGIN
from orchestrator.privacy.accounting import rounded_up
from orchestrator.report.page import Finding, Page, Picture, Section, Statement
from orchestrator.report.sheet import Sheet
from orchestrator.sweep.objectives import Objective
from orchestrator.sweep.result import Configuration, Result
from orchestrator.sweep.tables import front_sheet, trials_sheet

_CHOICE = (
    "Whichever is chosen, it is chosen by looking at private validation images. That tells something of them, and no "
    "epsilon covers it. Features of modules trained without noise have no guarantee towards their tenants."
)
_QUICK = (
    "Leakage was measured by the quick attackers, once each. That is enough to compare choices and not to call one "
    "private: evaluate the chosen one with pipelines/evaluate.py --budget full."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What was drawn."""

    front: tuple[Picture, ...] = ()
    response: tuple[Picture, ...] = ()


def tables_of(result: Result) -> list[Sheet]:
    """Every table, in the order of the page."""
    return [front_sheet(result), trials_sheet(result), result.plan.sheet()]


def page_of(result: Result, pictures: Pictures, *, versions: Mapping[str, str]) -> Page:
    """The whole report."""
    swept = ", ".join(d.name.replace("_", " ") for d in result.space.swept) or "seeds"
    return Page(
        title=f"Which features of {result.data} to sell",
        subtitle=f"A sweep of {len(result.trials)} trials over {swept}. {result.created[:10]}.",
        statements=_statements(result),
        findings=tuple(_findings(result)),
        sections=_sections(result, pictures),
        facts=_facts(result, versions),
        footer="Every number is also in sweep.json and sweep.parquet, beside this page.",
    )


def _statements(result: Result) -> tuple[Statement, ...]:
    plan = result.plan
    spent = (
        f"Everything that was ever trained under differential privacy on the images of {result.data}, this sweep "
        f"included, spent epsilon {rounded_up(result.spent)} at delta {plan.delta:g}, composed by Renyi DP; "
        f"{rounded_up(plan.spent_before)} before the sweep. Each encoder's own epsilon is smaller, and is what whoever "
        "gets that encoder alone has to know."
    )
    private = any(encoder.mechanism is not None for encoder in plan.encoders)
    return (
        Statement(subject="What the sweep cost", text=spent, strength="guaranteed" if private else "none"),
        Statement(subject="The choice", text=_CHOICE, strength="none"),
    )


def _findings(result: Result) -> Sequence[Finding]:
    found = [
        Finding(text=f"Best in {objective.name}: {_told(best, result.objectives)}.", mark="neutral")
        for objective in result.objectives
        if (best := result.best(objective)) is not None
    ]
    leaking = [c for c in result.front if c.mean("leakage") > CLAIM_MARGIN] if _has(result, "leakage") else []
    if leaking:
        found.append(
            Finding(
                text=f"{len(leaking)} of the {len(result.front)} choices on the front tell attackers more than "
                f"{100 * CLAIM_MARGIN:.0f} points above what needs no feature.",
                mark="bad",
            )
        )
    if _has(result, "leakage"):
        found.append(Finding(text=_QUICK, mark="neutral"))
    if result.failed:
        problems = "; ".join(f"{trial.point.words}: {trial.problem}" for trial in result.failed)
        found.append(Finding(text=f"{len(result.failed)} trial(s) failed: {problems}.", mark="bad"))
    return found


def _has(result: Result, name: str) -> bool:
    return any(name in trial.values for trial in result.trials)


def _told(configuration: Configuration, objectives: Sequence[Objective]) -> str:
    point = configuration.point
    values = ", ".join(f"{o.title.replace(', ', ' in ')} {o.shown(configuration.mean(o.name))}" for o in objectives)
    return f"{point.words.rpartition(', seed')[0]} ({values})"


def _sections(result: Result, pictures: Pictures) -> tuple[Section, ...]:
    return (
        Section(
            title="What may be chosen",
            paragraphs=(
                "A choice is listed if no other one is better in one objective and no worse in all others. Which of "
                "them to take is a question of what a point of utility is worth.",
            ),
            sheets=(front_sheet(result),),
            pictures=pictures.front,
            command=result.command,
        ),
        Section(
            title="How each parameter acts",
            paragraphs=("Each point is the mean over all trials with that value.",),
            pictures=pictures.response,
            command=result.command,
        ),
        Section(title="Every trial", sheets=(trials_sheet(result),), command=result.command),
        Section(
            title="What it stood on",
            paragraphs=(result.plan.words,),
            sheets=(result.plan.sheet(),),
            command=result.command,
        ),
    )


def _facts(result: Result, versions: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return (
        ("Catalog", result.catalog),
        ("Objectives", ", ".join(f"{o.name} ({o.direction})" for o in result.objectives)),
        ("Encoders trained", str(result.encoders_trained)),
        ("Wall time", f"{result.seconds:.0f} s"),
        *((f"Published as best-{name}", f"encoder {version}") for name, version in result.registered.items()),
        *((f"Version of {name}", version) for name, version in versions.items()),
    )
