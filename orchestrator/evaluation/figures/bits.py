"""Utility, attackers and their bounds over the bits of a feature, beside features that nothing bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.evaluation.comparison import Point, TargetPoint, TaskPoint
from orchestrator.evaluation.figures.drawing import (
    BASELINE,
    COLOURS,
    MARKERS,
    legend_below,
    mean_line,
    new_figure,
    plain_axes,
)
from orchestrator.privacy.bounded.bounds import accuracy_bound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 3
"""Panels beside each other."""
_CURVE = 80
"""Places at which a bound is computed."""


def has_bits_curve(points: Sequence[Point]) -> bool:
    """Whether some task has a bounded feature, and something to compare it with."""
    return any(
        any(task.bits is not None for task in tasks) and len({_kind(task) for task in tasks}) > 1
        for tasks in _by_task(points).values()
    )


def bits_curve(points: Sequence[Point]) -> Figure:
    """A panel for each task: its own accuracy, and the best attacker on each other label below its bound.

    Where several evaluations have the same bits, lines go through their mean and each has its dot.
    """
    by_task = _by_task(points)
    shown = {task: found for task, found in by_task.items() if any(p.bits is not None for p in found)}
    all_points = list(chain.from_iterable(shown.values()))
    unbounded = sorted({p.omega for p in all_points if p.bits is None and p.omega is not None})
    widest = max(p.bits for p in all_points if p.bits is not None)
    places = {omega: 1.15 * widest + 0.22 * widest * at for at, omega in enumerate(unbounded)}
    names = list(dict.fromkeys(target for p in all_points for target in p.targets))
    columns = min(len(shown), _ROW)
    rows = -(-len(shown) // columns)
    figure = new_figure(1.2 + 4.0 * columns, 0.9 + 3.4 * rows)
    for position, (task, found) in enumerate(shown.items()):
        ax = figure.add_subplot(rows, columns, position + 1)
        _panel(ax, found, places, names, widest=widest)
        ax.set_title(f"feature of {task}", fontsize=10)
        ax.set_ylabel("accuracy, %" if position % columns == 0 else "")
    figure.suptitle("What a feature's bits serve, and what they hide", fontsize=11)
    legend_below(figure, *figure.axes)
    return figure


def _panel(
    ax: Axes, found: Sequence[TaskPoint], places: Mapping[float, float], names: Sequence[str], *, widest: float
) -> None:
    def drawn(values: Sequence[tuple[TaskPoint, float | None]], colour: str, marker: str, name: str) -> None:
        """A line over bits, and a mark without one for each kind of feature that nothing bounds."""
        known = [(point, value) for point, value in values if value is not None]
        mean_line(ax, [(p.bits, v) for p, v in known if p.bits is not None], colour, marker, name)
        for omega, place in places.items():
            same = [(place, v) for p, v in known if p.bits is None and p.omega == omega]
            mean_line(ax, same, colour, marker, "", style="")

    drawn([(p, p.own) for p in found], "black", "*", "its own task")
    for target, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        at = [(p, p.targets[target]) for p in found if target in p.targets]
        if not at:
            continue
        drawn([(p, t.leak) for p, t in at], colour, marker, f"best attacker on {target}")
        _bounds(ax, at, colour, target, widest=widest)
        ax.axhline(100 * float(np.mean([t.baseline for _, t in at])), color=colour, linestyle=":", linewidth=0.8)
    ticks = sorted({p.bits for p in found if p.bits is not None})
    ax.set_xticks([*ticks, *places.values()], [*(f"{bits:.3g}" for bits in ticks), *map(_name, places)], fontsize=8)
    if places:
        ax.axvline(1.07 * widest, color=BASELINE, linewidth=0.8)
    ax.set_xlim(0, max([1.05 * widest, *(place + 0.12 * widest for place in places.values())]))
    ax.set_ylim(0, 103)
    ax.set_xlabel("bits of an image at most" + (" | not bounded" if places else ""))
    plain_axes(ax)


def _bounds(ax: Axes, at: Sequence[tuple[TaskPoint, TargetPoint]], colour: str, target: str, *, widest: float) -> None:
    """The bound by capacity as the curve that it is, and that by the measured rate where it was measured."""
    shares = next((t.shares for _, t in at if t.shares), None)
    if shares is not None:
        bits = np.linspace(0, 1.05 * widest, _CURVE)
        curve = [100 * accuracy_bound(float(b), shares).accuracy for b in bits]
        ax.plot(bits, curve, color=colour, linestyle="--", linewidth=1, label=f"bound on {target}")
    rates = [(p.bits, t.rate_bound) for p, t in at if p.bits is not None and t.rate_bound is not None]
    if rates:
        x, y = zip(*rates, strict=True)
        ax.scatter(x, [100 * value for value in y], color=colour, marker="x", s=30, label=f"rate bound on {target}")


def _by_task(points: Sequence[Point]) -> dict[str, list[TaskPoint]]:
    """Of those that were attacked, and of which it is known what was done to keep attackers off."""
    found: dict[str, list[TaskPoint]] = {}
    for point in points:
        for task, measured in point.tasks.items():
            known = measured.bits is not None or measured.omega is not None
            if known and any(target.leak is not None for target in measured.targets.values()):
                found.setdefault(task, []).append(measured)
    return found


def _kind(point: TaskPoint) -> tuple[str, float | None]:
    return ("omega", point.omega) if point.bits is None else ("bits", point.bits)


def _name(omega: float) -> str:
    return "none" if omega == 0 else f"$\\omega$\n{omega:g}"
