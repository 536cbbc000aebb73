"""The page as HTML: plain values in, text out. Every text may come from strangers, so the templates escape all of them,
and the content security policy forbids what should slip through: nothing but this page's own files is loaded or run.

Works without scripts but for looking at an image of one's own, and for numbers that refresh by themselves.
"""

from __future__ import annotations

import datetime
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, Literal

from orchestrator.report.page import printable
from serve.operator.sessions import Session
from serve.operator.views import Look, Served, Unreadable, VersionView
from serve.traffic import SLOT_S, SLOTS, Traffic

if TYPE_CHECKING:
    from jinja2 import Environment

STATIC: Final = {"operator.css": "text/css; charset=utf-8", "operator.js": "text/javascript; charset=utf-8"}
"""File to media type. Nothing is in them that anybody may not read."""
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: under that, browsers hide where a form comes from, and it could not be checked.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}

_LINE_WIDTH, _LINE_HEIGHT = 180, 24
_MINUTES: Final = SLOTS * SLOT_S // 60


@dataclass(frozen=True, kw_only=True, slots=True)
class AppState:
    """One task's app, as Serve tells it."""

    state: str
    replicas: str
    """Number by state, for people."""
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficLine:
    """One verb of one task."""

    task: str
    verb: str
    per_minute: float
    """Over the last minute."""
    per_minute_long: float
    """Over all that is kept."""
    total: int
    refused: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    line: str
    """Points of an SVG polyline: requests over time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """One guarantee, and whose it is."""

    tasks: tuple[str, ...]
    text: str
    strength: Literal["guaranteed", "none"]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the operator sees."""

    session: Session
    served: Served | None
    """None: it could not be described, and ``fault`` says why."""
    fault: str = ""
    states: Mapping[str, AppState] = field(default_factory=dict)
    traffic: Traffic
    sample: int = 1
    look: Look | Unreadable | None = None
    """None: nobody asked for one."""


def page_html(page: Page) -> str:
    """The whole page."""
    return _render(
        "page.html.j2",
        page=page,
        served=page.served,
        look=page.look,
        promises=_promises(page.served),
        traffic=traffic_lines(page.traffic),
        minutes=_MINUTES,
        expires=datetime.datetime.fromtimestamp(page.session.expires, datetime.UTC),
    )


def look_html(page: Page) -> str:
    """The live look alone, to be put in the place of the one before."""
    return _render("look.html.j2", page=page, served=page.served, look=page.look)


def traffic_html(traffic: Traffic) -> str:
    """The numbers that change alone."""
    return _render("traffic.html.j2", traffic=traffic_lines(traffic), minutes=_MINUTES)


def login_html(*, fault: str = "") -> str:
    """The form to sign in with."""
    return _render("login.html.j2", fault=fault)


def message_html(title: str, detail: str = "") -> str:
    """Why there is no page."""
    return _render("message.html.j2", title=title, detail=detail)


@cache
def static_file(name: str) -> bytes:
    """One of `STATIC`. The style is the reports' with what only this page has."""
    own = files(__package__).joinpath("templates", name).read_bytes()
    return own if name != "operator.css" else files("orchestrator.report").joinpath("page.css").read_bytes() + own


def traffic_lines(traffic: Traffic) -> list[TrafficLine]:
    """By task and verb."""
    lines = []
    for key in traffic.asked():
        all_of_it = traffic.over(key, _MINUTES)
        lines.append(
            TrafficLine(
                task=key[0],
                verb=key[1],
                per_minute=traffic.per_minute(key, 1),
                per_minute_long=traffic.per_minute(key, _MINUTES),
                total=all_of_it.total,
                refused=all_of_it.refused,
                failed=all_of_it.failed,
                p50_ms=_ms(all_of_it.quantile(0.5)),
                p99_ms=_ms(all_of_it.quantile(0.99)),
                line=_line(traffic.history(key)),
            )
        )
    return lines


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _line(counts: Sequence[int]) -> str:
    highest = max(*counts, 1)
    step = _LINE_WIDTH / (len(counts) - 1)
    points = ((i * step, 1 + (_LINE_HEIGHT - 2) * (1 - n / highest)) for i, n in enumerate(counts))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _promises(served: Served | None) -> list[Promise]:
    """Each text once."""
    found: dict[tuple[str, bool], list[str]] = {}
    for task in () if served is None else served.tasks:
        for version in task.versions:
            if version.card is not None:
                name = f"{task.task} {version.version}" if len(task.versions) > 1 else task.task
                found.setdefault((version.card["guarantee"], _is_guaranteed(version)), []).append(name)
    return [
        Promise(tasks=tuple(tasks), text=text, strength="guaranteed" if guaranteed else "none")
        for (text, guaranteed), tasks in found.items()
    ]


def _is_guaranteed(version: VersionView) -> bool:
    card = version.card
    return card is not None and (card["epsilon"] is not None or card["bits_per_feature"] is not None)


def _render(template: str, **values: Any) -> str:
    return printable(_templates().get_template(template).render(**values))


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["png"] = lambda picture: "data:image/png;base64," + b64encode(picture).decode("ascii")
    templates.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    return templates
