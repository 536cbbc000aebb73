"""Utility and leakage over epsilon (the paper's Figure 7) and over omega (its Figure 9), from several evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.evaluation.comparison import Point, Scope, TaskPoint
from orchestrator.evaluation.figures.drawing import (
    BASELINE,
    COLOURS,
    MARKERS,
    legend_below,
    mean_line,
    new_figure,
    plain_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCOPE_NAMES: tuple[tuple[Scope, str], ...] = (("encoder", "DP on the encoder"), ("whole", "DP on the whole model"))
Measure = Callable[[TaskPoint], float | None]
_PANELS: tuple[tuple[str, Measure], ...] = (
    ("own accuracy, %", lambda task: task.own),
    ("best attacker: excess, points", lambda task: task.excess),
)


def has_epsilon_curve(points: Sequence[Point]) -> bool:
    """Whether there are two budgets to compare, no budget at all included."""
    return len({point.epsilon for point in points if _measured(point)}) > 1


def has_omega_curve(points: Sequence[Point]) -> bool:
    """Whether there are two weights of the dissimilarity term to compare."""
    return len({point.omega for point in points if _measured(point)} - {None}) > 1


def privacy_utility(points: Sequence[Point]) -> Figure:
    """Mean over the tasks against epsilon, a line for each scope of DP; without DP is a level of its own.

    Where several evaluations have one scope and epsilon, the line goes through their mean and each has its dot.
    """
    figure = new_figure(8.6, 3.7)
    for position, (label, measure) in enumerate(_PANELS):
        ax = figure.add_subplot(1, 2, position + 1)
        for (scope, name), colour, marker in zip(_SCOPE_NAMES, COLOURS, MARKERS, strict=False):
            found = [(p.epsilon, v) for p in points if p.scope == scope and (v := _mean(p, measure)) is not None]
            mean_line(ax, [(float(x), y) for x, y in found if x is not None], colour, marker, name)
        without = [v for p in points if p.scope == "none" and (v := _mean(p, measure)) is not None]
        if without:
            ax.axhline(100 * float(np.mean(without)), color=BASELINE, linestyle=":", label="without DP")
        if position == 1:  # on a scale of its own a point would look like a protection
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.set_xscale("log", base=2)
        epsilons = sorted({p.epsilon for p in points if p.epsilon is not None})
        ax.set_xticks(epsilons, [f"{epsilon:.3g}" for epsilon in epsilons])
        ax.minorticks_off()
        ax.set_xlabel("epsilon (smaller: more private training images)")
        ax.set_ylabel(label)
        plain_axes(ax)
    figure.suptitle("What differential privacy costs, and what it hides", fontsize=11)
    legend_below(figure, figure.axes[0])
    return figure


def omega_curve(points: Sequence[Point]) -> Figure:
    """A line a task: its own accuracy, what attackers and the swap test find, against omega."""
    known = [point for point in points if point.omega is not None]
    tasks = sorted({task for point in known for task in point.tasks})
    figure = new_figure(8.6, 3.7)
    omegas = [point.omega for point in known if point.omega is not None]
    least = min((omega for omega in omegas if omega), default=1e-3)
    for position, (label, measure) in enumerate(_PANELS):
        ax = figure.add_subplot(1, 2, position + 1)
        for task, colour, marker in zip(tasks, COLOURS, MARKERS, strict=False):
            mean_line(ax, _of_task(known, task, measure), colour, marker, task)
            if position == 1:
                swap = _of_task(known, task, lambda point: point.swap)
                mean_line(ax, swap, colour, marker, f"{task}, swap test", style="--")
        ax.axhline(0, color=BASELINE, linestyle=":") if position == 1 else None
        ax.set_xscale("symlog", linthresh=least)
        ax.set_xlim(min(omegas) - least / 4, 1.25 * max(omegas) + least / 4)
        ax.set_xlabel("omega (weight of the dissimilarity term)")
        ax.set_ylabel(label if position == 0 else "excess, points")
        plain_axes(ax)
    figure.suptitle("What the dissimilarity term costs, and what it hides", fontsize=11)
    legend_below(figure, figure.axes[1])
    return figure


def _measured(point: Point) -> bool:
    """Whether its evaluation had anything to say of its tasks."""
    return any(task.excess is not None for task in point.tasks.values())


def _of_task(points: Sequence[Point], task: str, measure: Measure) -> list[tuple[float, float]]:
    found = []
    for point in points:
        value = measure(point.tasks[task]) if task in point.tasks else None
        if value is not None and point.omega is not None:
            found.append((point.omega, value))
    return found


def _mean(point: Point, measure: Measure) -> float | None:
    values = [value for task in point.tasks.values() if (value := measure(task)) is not None]
    return float(np.mean(values)) if values else None
