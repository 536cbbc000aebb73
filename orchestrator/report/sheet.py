"""One table as text, and how a terminal and a Markdown document show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "-"
CRASHED = "crashed"

Mark = Literal["", "good", "bad", "crashed"]
"""What the last cell of a row is, apart from its text: colours say it too, and never they alone."""
_STYLES: Mapping[Mark, str] = {"": "", "good": "green", "bad": "bold red", "crashed": "bold yellow"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One table as text."""

    title: str
    names: Sequence[str]
    """Of the columns."""
    rows: Sequence[Sequence[str]]
    note: str = ""
    """How to read it; shown below."""
    marks: Sequence[Mark] = ()
    """One a row; none: no cell is marked."""
    words: frozenset[str] = frozenset()
    """Columns of text: they are left aligned, and may wrap where there is little room."""
    repeated: frozenset[str] = frozenset()
    """Columns that are shown once for neighbouring rows that begin with the same cell."""


def markdown(sheet: Sheet) -> str:
    """Title, table and note."""
    rules = ["---" if name in sheet.words else "---:" for name in sheet.names]
    lines = [f"| {' | '.join(cells)} |" for cells in [sheet.names, rules, *sheet.rows]]
    return "\n".join([f"**{sheet.title}**", "", *lines, "", *([sheet.note, ""] if sheet.note else [])])


def terminal(sheet: Sheet) -> Table:
    """A rich table; a crash stands out in any cell."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=sheet.title,
        caption=sheet.note or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for name, cells in zip(sheet.names, zip(*sheet.rows, strict=True), strict=True):
        justify: Literal["left", "right"] = "left" if name in sheet.words else "right"
        words = name in sheet.words or any(CRASHED in cell for cell in cells)
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=not words, overflow="fold")
    starts = [True, *(row[0] != before[0] for before, row in pairwise(sheet.rows))]
    ends = [*starts[1:], True]
    marks = sheet.marks or [""] * len(sheet.rows)
    for row, mark, first, last in zip(sheet.rows, marks, starts, ends, strict=True):
        shown = [
            cell if first or name not in sheet.repeated else "" for name, cell in zip(sheet.names, row, strict=True)
        ]
        texts = [Text(cell, style="bold yellow" if CRASHED in cell else "") for cell in shown]
        texts[-1].style = _STYLES[mark] or texts[-1].style
        table.add_row(*texts, end_section=last and bool(sheet.repeated))
    return table


def percent(value: float | None) -> str:
    """``97.4``, or a dash where nothing was measured."""
    return NOT_MEASURED if value is None or math.isnan(value) else f"{100 * value:.1f}"
