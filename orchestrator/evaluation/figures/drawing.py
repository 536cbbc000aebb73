"""What all figures share: a canvas without a display, colours for every colour vision, and two file formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Sequence[str] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which differ in hue and in lightness; black and grey are for baselines."""
MARKERS: Sequence[str] = ("o", "s", "^", "D", "v", "P")
BASELINE = "0.45"


def new_figure(width: float, height: float) -> Figure:
    """In inches, on a canvas of its own: `pyplot` keeps figures, and what works with it in one thread only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, *, svg: str | None = None) -> tuple[Path, Path]:
    """Write ``path`` as PNG and a scalable copy beside it as SVG; missing folders are made. Returns both paths.

    ``svg`` is that copy where it was drawn before: drawing takes longer than all else.
    """
    png, scalable = path.with_suffix(".png"), path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
    if svg is None:
        figure.savefig(scalable)
    else:
        scalable.write_text(svg, encoding="utf-8")
    return png, scalable


def plain_axes(ax: Axes) -> None:
    """No frame but the two lines that carry numbers, and a light grid across."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)


def legend_below(figure: Figure, *axes: Axes) -> None:
    """One legend for all panels, of what is in any of these; it may take several lines."""
    named: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        handles, labels, columns = list(named.values()), list(named), min(len(named), 4)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def mean_line(
    ax: Axes, found: Sequence[tuple[float, float]], colour: str, marker: str, name: str, *, style: str = "-"
) -> None:
    """Fractions as %, through the mean of each place; where a place has several, each has its dot."""
    if not found:
        return
    places = sorted({x for x, _ in found})
    means = [100 * fmean(y for x, y in found if x == place) for place in places]
    ax.plot(places, means, linestyle=style, color=colour, marker=marker, markersize=5, label=name)
    if len(found) > len(places):
        ax.scatter([x for x, _ in found], [100 * y for _, y in found], s=9, color=colour, alpha=0.6, zorder=3)
