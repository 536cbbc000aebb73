"""A matplotlib figure as a picture of a page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from orchestrator.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Any constant will do: without one, matplotlib draws the ids of an SVG at random.
_SALT = "metamorphosis-ray"


def picture_of(figure: Figure, *, title: str, caption: str, alt: str) -> Picture:
    """The figure on white, its text as outlines; figures drawn alike give the same bytes."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": _SALT, "svg.fonttype": "path"}):
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white", transparent=False
        )
    return Picture(title=title, svg=buffer.getvalue(), caption=caption, alt=alt)
