"""Moments as people write them: so long from now, or a date."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from orchestrator.errors import ConfigError

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SPAN: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", re.ASCII)
_LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def span(text: str) -> float:
    """Seconds of ``30s``, ``15m``, ``12h``, ``90d`` or ``2w``. Raises `ConfigError`."""
    if (found := _SPAN.fullmatch(text.strip())) is None:
        raise ConfigError(f"{text!r} is no span of time: write 30s, 15m, 12h, 90d or 2w")
    return float(found[1]) * _SECONDS[found[2]]


def moment(text: str, *, now: float) -> float:
    """Unix time of a span from ``now`` on, or of an ISO 8601 date or date and time, of UTC where it names no zone.

    Raises `ConfigError`.
    """
    if _SPAN.fullmatch(text.strip()):
        at = now + span(text)
    else:
        try:
            said = datetime.fromisoformat(text.strip())
            at = (said if said.tzinfo is not None else said.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise ConfigError(
                f"{text!r} is no moment: write a span from now on (30s, 15m, 12h, 90d, 2w), a date (2027-01-31), "
                "or a date and time (2027-01-31T08:00, in UTC, or with a zone: +01:00)"
            ) from error
    if at >= _LATEST:
        raise ConfigError(f"{text!r} is later than a date can be")
    return at


def shown(at: float) -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
