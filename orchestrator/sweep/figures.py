"""A sweep as figures: the front, and how each parameter acts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation.figures.drawing import BASELINE, COLOURS, legend_below, new_figure, plain_axes
from orchestrator.sweep.objectives import OBJECTIVES, Objective
from orchestrator.sweep.records import Trial
from orchestrator.sweep.result import Configuration, Result
from orchestrator.sweep.space import Dimension, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "omega": "omega",
    "epsilon": "epsilon (none: without DP)",
    "split_index": "split index",
    "feature_bits": "bits of a feature (none: not bounded)",
}
_SMALLEST, _LARGEST = 30.0, 260.0
"""Areas of the dots, in points squared."""
_TICKS = 8


def pareto_figure(result: Result) -> Figure | None:
    """Utility against excess leakage, coloured by epsilon, sized by bytes, the front ringed and joined.

    Where one of the two was not measured, another objective takes its place. None where there are no two to draw.
    """
    axes = _axes(result)
    found = [c for c in result.configurations if axes and all(_finite(c, o) for o in axes)]
    if axes is None or not found:
        return None
    x, y = axes
    figure = new_figure(7.2, 4.8)
    ax = figure.add_subplot()
    private = [c for c in found if math.isfinite(c.mean("epsilon"))]
    open_ones = [c for c in found if c not in private]
    if open_ones:
        ax.scatter(*_places(open_ones, x, y), s=_areas(open_ones, found), color="0.55", label="without DP", zorder=3)
    if private:
        drawn = ax.scatter(
            *_places(private, x, y),
            s=_areas(private, found),
            c=[_asked(c) for c in private],
            cmap="viridis",
            norm=_scale(private),
            zorder=3,
        )
        if len(asked := sorted({_asked(c) for c in private})) == 1:
            drawn.set_label(f"epsilon {asked[0]:g}")
        else:
            bar = figure.colorbar(drawn, ax=ax, label="epsilon (smaller: more private training images)")
            bar.set_ticks(asked if len(asked) <= _TICKS else [asked[0], asked[-1]])
            bar.set_ticklabels([shown(float(f"{tick:.3g}")) for tick in bar.get_ticks()])
            bar.minorticks_off()
    front = sorted((c for c in result.front if c in found), key=lambda c: x.scale * c.mean(x.name))
    if front:
        places = _places(front, x, y)
        ax.scatter(
            *places, s=[a + 90 for a in _areas(front, found)], facecolors="none", edgecolors=COLOURS[1], linewidths=1.6,
            label="no other beats it", zorder=4,
        )  # fmt: skip
    for configuration in found:
        _whiskers(ax, configuration, x, y)
    ax.set_xlabel(x.title)
    ax.set_ylabel(y.title)
    ax.set_title(f"What may be chosen, {result.data}; a larger dot: more bytes a feature", fontsize=10)
    plain_axes(ax)
    legend_below(figure, ax)
    return figure


def response_figure(result: Result) -> Figure | None:
    """For each parameter that was varied: each objective over it, the mean over everything else, seeds as a band.

    None where nothing was varied or nothing came through.
    """
    swept = result.space.swept
    measures = [o for o in result.objectives if o.name != "epsilon" and _varies(result, o)]
    done = [trial for trial in result.trials if trial.status == "done"]
    if not swept or not measures or not done:
        return None
    figure = new_figure(3.4 * len(swept) + 0.6, 2.5 * len(measures) + 0.5)
    for row, objective in enumerate(measures):
        for column, dimension in enumerate(swept):
            ax = figure.add_subplot(len(measures), len(swept), row * len(swept) + column + 1)
            _response(ax, done, dimension, objective)
            if column == 0:
                ax.set_ylabel(objective.title, fontsize=9)
            if row == len(measures) - 1:
                ax.set_xlabel(_TITLES[dimension.name], fontsize=9)
            plain_axes(ax)
    seeds = len(result.space.seed.values)
    band = "" if seeds == 1 else f"; band: {seeds} seeds"
    figure.suptitle(f"How each parameter acts: mean over all other choices{band}", fontsize=10)
    return figure


def _response(ax: Axes, trials: Sequence[Trial], dimension: Dimension, objective: Objective) -> None:
    def mean_at(place: Any, seed: int | None = None) -> float:
        found = [
            objective.scale * value
            for trial in trials
            if getattr(trial.point, dimension.name) == place and (seed is None or trial.point.seed == seed)
            if math.isfinite(value := trial.values.get(objective.name, math.nan))
        ]
        return fmean(found) if found else math.nan

    places = sorted({getattr(t.point, dimension.name) for t in trials}, key=lambda v: math.inf if v is None else v)
    if dimension.kind != "choice":
        ax.scatter(
            [getattr(t.point, dimension.name) for t in trials],
            [objective.scale * t.values.get(objective.name, math.nan) for t in trials],
            s=14, color=COLOURS[0],
        )  # fmt: skip
        ax.set_xscale("log" if dimension.kind == "loguniform" else "linear")
        return
    # Values of a list stand side by side: a parameter may be 0, none, or spread over decades.
    at = range(len(places))
    seeds = sorted({trial.point.seed for trial in trials})
    if len(seeds) > 1:
        by_seed = [[mean_at(place, seed) for seed in seeds] for place in places]
        ax.fill_between(at, [min(m) for m in by_seed], [max(m) for m in by_seed], color=COLOURS[0], alpha=0.2)
    ax.plot(at, [mean_at(place) for place in places], color=COLOURS[0], marker="o", markersize=4)
    ax.set_xticks(list(at), [shown(place) for place in places])


def _axes(result: Result) -> tuple[Objective, Objective] | None:
    measured = {name for c in result.configurations for name in c.values()}
    y = next((OBJECTIVES[n] for n in ("utility", *(o.name for o in result.objectives)) if n in measured), None)
    others = ("leakage", *(o.name for o in result.objectives), "bytes")
    x = next((OBJECTIVES[n] for n in others if n in measured and OBJECTIVES[n] is not y), None)
    return None if x is None or y is None else (x, y)


def _finite(configuration: Configuration, objective: Objective) -> bool:
    return math.isfinite(configuration.mean(objective.name))


def _places(found: Sequence[Configuration], x: Objective, y: Objective) -> tuple[list[float], list[float]]:
    return [x.scale * c.mean(x.name) for c in found], [y.scale * c.mean(y.name) for c in found]


def _areas(some: Sequence[Configuration], of: Sequence[Configuration]) -> list[float]:
    """By the logarithm of the bytes: they are spread over orders of magnitude."""
    size: Callable[[Configuration], float] = lambda c: math.log(max(1.0, c.mean("bytes")))  # noqa: E731
    low, high = min(map(size, of)), max(map(size, of))
    span = high - low
    return [_SMALLEST + (_LARGEST - _SMALLEST) * ((size(c) - low) / span if span else 0.3) for c in some]


def _asked(configuration: Configuration) -> float:
    """Epsilon as it was asked for: trainings of one budget end a hair apart."""
    return configuration.point.epsilon or math.inf


def _scale(private: Sequence[Configuration]) -> Any:
    from matplotlib.colors import LogNorm

    low, high = min(map(_asked, private)), max(map(_asked, private))
    return LogNorm(vmin=low, vmax=high if high > low else low * 1.01)


def _whiskers(ax: Axes, configuration: Configuration, x: Objective, y: Objective) -> None:
    """From the least to the most of the seeds."""
    if len(configuration.trials) == 1:
        return
    (left, right), (low, high) = configuration.spread(x.name), configuration.spread(y.name)
    ax.plot(
        [x.scale * left, x.scale * right], [y.scale * configuration.mean(y.name)] * 2, color=BASELINE, linewidth=0.8
    )
    ax.plot([x.scale * configuration.mean(x.name)] * 2, [y.scale * low, y.scale * high], color=BASELINE, linewidth=0.8)


def _varies(result: Result, objective: Objective) -> bool:
    return any(math.isfinite(t.values.get(objective.name, math.nan)) for t in result.trials if t.status == "done")
