"""A leakage report as heat maps: features down, targets across."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from orchestrator.evaluation.figures.drawing import new_figure
from orchestrator.evaluation.report import LeakageReport, LeakageRow
from orchestrator.report.sheet import CRASHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OWN_COLOUR = "0.88"
_EMPTY_COLOUR = "1.0"


class _Panel(NamedTuple):
    title: str
    value: Callable[[LeakageRow], float | None]
    colours: str
    low: float
    high: float
    unit: str
    number: str
    missing: str


def leakage_heatmap(report: LeakageReport) -> Figure:
    """Three panels: the swap test, the best retrained attacker, and its excess over what needs no feature.

    The cell of a task's own label shows how well the task itself is done, on grey: that is utility, not leakage.
    Colours can be told apart with any colour vision, and every number is written out.
    """
    n_rows, n_columns = len(report.features), len(report.targets)
    cell = 0.95
    figure = new_figure(2.4 + 3 * (0.7 + cell * n_columns), 2.3 + 0.72 * n_rows)
    figure.suptitle("What each task's feature tells about each label", fontsize=12)
    panels = _panels(report)
    axes = [figure.add_subplot(1, len(panels), position + 1) for position in range(len(panels))]
    for position, (panel, ax) in enumerate(zip(panels, axes, strict=True)):
        _draw(ax, panel, report)
        ax.set_yticks(range(n_rows), report.features if position == 0 else [""] * n_rows, fontsize=9)
        if position > 0:
            figure.colorbar(ax.images[0], ax=ax, fraction=0.05, pad=0.03).set_label(panel.unit, fontsize=8)
    if any(attack.crashed for row in report.rows for attack in row.attacks):
        figure.supxlabel("* without the attackers that crashed", fontsize=8)
    axes[0].set_ylabel("released feature, by task", fontsize=9)
    return figure


def _panels(report: LeakageReport) -> tuple[_Panel, ...]:
    largest = max((abs(row.excess) for row in report.rows if row.excess is not None), default=0.0)
    bound = max(10.0, 10 * math.ceil(10 * largest))
    return (
        _Panel(
            "Swap test\n(the target's own head)", lambda row: row.swap, "cividis", 0, 100, "accuracy, %", ".1f", "n/a"
        ),
        _Panel("Best retrained attacker", lambda row: row.leak, "cividis", 0, 100, "accuracy, %", ".1f", CRASHED),
        _Panel(
            "Excess over chance and label floor",
            lambda row: row.excess,
            "PuOr_r",
            -bound,
            bound,
            "percentage points",
            "+.1f",
            CRASHED,
        ),
    )


def _draw(ax: Axes, panel: _Panel, report: LeakageReport) -> None:
    """One heat map with its numbers."""
    from matplotlib import colormaps

    values = np.full((len(report.features), len(report.targets)), np.nan)
    for row in report.rows:
        value = panel.value(row)
        if value is not None:
            values[report.features.index(row.feature), report.targets.index(row.target)] = 100 * value
    colours = colormaps[panel.colours].with_extremes(bad=_EMPTY_COLOUR)
    ax.imshow(values, cmap=colours, vmin=panel.low, vmax=panel.high, aspect="auto")
    for i, feature in enumerate(report.features):
        for j, target in enumerate(report.targets):
            if target == feature:
                _own(ax, i, j, report.own.get(feature))
            elif math.isnan(values[i, j]):
                ax.text(j, i, panel.missing, ha="center", va="center", fontsize=8, color="0.3", style="italic")
            else:
                ink = _ink(colours((values[i, j] - panel.low) / (panel.high - panel.low)))
                text = format(round(values[i, j], 1) + 0.0, panel.number)  # adding zero turns -0.0 into 0.0
                if panel.missing == CRASHED and any(a.crashed for a in report.row(feature, target).attacks):
                    text += "*"
                ax.text(j, i, text, ha="center", va="center", fontsize=9, color=ink)
    ax.set_title(panel.title, fontsize=10)
    names = [f"{target}\n(private)" if target in report.private else target for target in report.targets]
    ax.set_xticks(range(len(names)), names, fontsize=9, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_xlabel("target label", fontsize=9)
    ax.set_xticks(np.arange(len(report.targets) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(report.features) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0)


def _own(ax: Axes, i: int, j: int, own: float | None) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=_OWN_COLOUR, edgecolor="white", linewidth=1.5))
    text = "own" if own is None else f"own\n{100 * own:.1f}"
    ax.text(j, i, text, ha="center", va="center", fontsize=8, color="black")


def _ink(shade: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out from that colour (relative luminance of sRGB)."""
    red, green, blue = shade[:3]
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"
