"""Every figure of a sweep, for files and for the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.report.figure import picture_of
from orchestrator.sweep.document import Pictures
from orchestrator.sweep.figures import pareto_figure, response_figure
from orchestrator.sweep.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Figures by file name, and the same as pictures of a page."""

    figures: dict[str, Figure] = field(default_factory=dict)
    pictures: Pictures = Pictures()


def draw(result: Result) -> Drawn:
    """What the trials that came through allow to be drawn."""
    figures = {
        name: figure
        for name, figure in (("pareto", pareto_figure(result)), ("response", response_figure(result)))
        if figure is not None
    }
    front = [
        picture_of(
            figures["pareto"],
            title="What may be chosen",
            caption="Each dot is a configuration; lines reach from its least to its best seed. Ringed: no other beats "
            "it in all objectives together.",
            alt=f"A scatter plot of {len(result.configurations)} configurations, of which {len(result.front)} are "
            "ringed; the table has their numbers.",
        )
        for _ in figures.keys() & {"pareto"}
    ]
    response = [
        picture_of(
            figures["response"],
            title="How each parameter acts",
            caption="Mean over all other choices.",
            alt="A panel for each objective and parameter, with a line over the parameter's values.",
        )
        for _ in figures.keys() & {"response"}
    ]
    return Drawn(figures=figures, pictures=Pictures(front=tuple(front), response=tuple(response)))
