"""A report as one HTML file that loads nothing: text, tables, figures and style are all inside.

Every text may come from strangers (a task is named by a column of a user's file), so the template escapes all of them,
and the page's content security policy forbids scripts and requests even if one should slip through.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Literal

from orchestrator.report.sheet import CRASHED, NOT_MEASURED, Mark, Sheet

Strength = Literal["guaranteed", "measured", "none"]
"""Of a statement: proven for every input; seen in a measurement, which another attacker may beat; or not promised."""
Verdict = Literal["good", "bad", "neutral"]

_STRENGTHS: Mapping[Strength, str] = {
    "guaranteed": "guaranteed",
    "measured": "measured, not guaranteed",
    "none": "no guarantee",
}
# Controls are invalid in HTML, lone surrogates in UTF-8, and direction overrides can reorder the text around a name.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_SVG_WIDTH = re.compile(r'<svg\b[^>]*\bwidth="([0-9.]+)(pt|px)?"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What is promised about one thing, or that nothing is."""

    subject: str
    text: str
    strength: Strength


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One sentence: what was tested, and what was found."""

    text: str
    mark: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure, drawn for a white background."""

    title: str
    svg: str
    """A whole SVG document. It gets an image of its own, where its ids clash with no other's and no script runs."""
    caption: str
    alt: str
    """What it shows, for those who cannot see it."""

    def __post_init__(self) -> None:
        assert self.alt.strip(), f"the picture {self.title!r} has no text for those who cannot see it"

    @property
    def source(self) -> str:
        """The SVG as a ``data:`` URI."""
        return "data:image/svg+xml;base64," + b64encode(self.svg.encode()).decode("ascii")

    @property
    def width_px(self) -> int:
        """As drawn, in CSS pixels; 640 where the SVG does not say."""
        found = _SVG_WIDTH.search(self.svg)
        return 640 if found is None else round(float(found[1]) * (4 / 3 if found[2] == "pt" else 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What belongs together: shown in the order of the fields."""

    title: str
    paragraphs: tuple[str, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    pictures: tuple[Picture, ...] = ()
    command: str | None = None
    """A shell command that makes these numbers again; none where they come from outside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A report. Sections, tables and figures are numbered in order, so that they can be cited."""

    title: str
    subtitle: str
    statements: tuple[Statement, ...]
    findings: tuple[Finding, ...]
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]
    """Configuration, versions and seeds, each with its name."""
    footer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    text: str
    mark: Mark
    rows: int
    """How many rows it covers."""
    heads: Literal["", "row", "rowgroup"]
    words: bool

    @property
    def style(self) -> str:
        """Classes; a crash stands out in any cell."""
        mark = self.mark or ("crashed" if CRASHED in self.text else "")
        return " ".join(filter(None, ["words" if self.words else "", mark]))

    @property
    def mark_word(self) -> str:
        """The mark in a word, unless the text has it already."""
        return "" if self.mark in re.findall(r"\w+", self.text) else self.mark


def render(page: Page) -> str:
    """The page as HTML; the same page gives the same text. Write it as UTF-8."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["prose"] = _prose
    template = templates.get_template("page.html.j2")
    html = template.render(
        page=page,
        strengths=_STRENGTHS,
        groups=_groups,
        longest=_longest,
        parts=_parts,
        not_measured=NOT_MEASURED,
    )
    return printable(html)


def printable(html: str) -> str:
    """The same, with a sign in the place of every character that a page cannot hold or should not."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", html)


def _prose(text: str) -> str:
    """No line begins with the percent sign of a number."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)


def _groups(sheet: Sheet) -> list[list[list[_Cell]]]:
    """Rows of cells, those that share repeated cells together."""
    unmarked: list[Mark] = [""] * len(sheet.rows)
    marked = list(zip(sheet.rows, sheet.marks or unmarked, strict=True))
    if not sheet.repeated:
        return [list(_rows(sheet, marked))]
    return [list(_rows(sheet, list(group))) for _, group in groupby(marked, key=lambda pair: pair[0][0])]


def _rows(sheet: Sheet, group: Sequence[tuple[Sequence[str], Mark]]) -> Iterator[list[_Cell]]:
    """The rows of one group. A repeated cell covers the equal ones below it; nothing else is left out."""
    n_heads, last = _n_heads(sheet), len(sheet.names) - 1
    rows = [row for row, _ in group]
    for i, (row, mark) in enumerate(group):
        cells = []
        for j, (name, text) in enumerate(zip(sheet.names, row, strict=True)):
            # The last cell carries the row's own mark, so that every row keeps it.
            covers = name in sheet.repeated and j < last
            if covers and i > 0 and rows[i - 1][j] == text:
                continue
            n_rows = _n_equal([other[j] for other in rows[i:]]) if covers else 1
            cells.append(
                _Cell(
                    text=text,
                    mark=mark if j == last else "",
                    rows=n_rows,
                    heads="" if j >= n_heads else "rowgroup" if j == 0 and n_rows > 1 else "row",
                    words=name in sheet.words,
                )
            )
        yield cells


def _n_equal(texts: Sequence[str]) -> int:
    """How many are like the first, from there on."""
    return len(list(takewhile(lambda text: text == texts[0], texts)))


def _n_heads(sheet: Sheet) -> int:
    """How many cells name a row: the words it begins with. In a table of only words it is the first."""
    leading = sum(1 for _ in takewhile(lambda name: name in sheet.words, sheet.names))
    return leading if 0 < leading < len(sheet.names) else 1


def _longest(sheet: Sheet) -> list[int]:
    """Characters of the longest cell of each column."""
    columns = list(zip(*sheet.rows, strict=True)) if sheet.rows else [()] * len(sheet.names)
    return [max(map(len, cells), default=0) for _, cells in zip(sheet.names, columns, strict=True)]


def _parts(command: str) -> list[str]:
    """Words, and the space between them at every odd place."""
    return re.split(r"(\s+)", command)
