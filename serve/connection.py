"""What every client of a served task needs: an address, a token, whom to trust, and pauses before trying again.

For devices: the standard library alone, and Python 3.9.
"""

from __future__ import annotations

import email.utils
import ipaddress
import random
import ssl
import stat
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Union
from urllib.parse import urlsplit

from tasks.errors import ConfigError, DataError

Verify = Union[bool, ssl.SSLContext]
_MOST_DIGITS = 7
"""Of seconds to wait: some months."""


@dataclass(frozen=True)
class Patience:
    """How long a client goes on trying."""

    total_s: float | None = 60.0
    """Since the last answer; None: for ever."""
    first_s: float = 0.25
    """Longest first pause."""
    longest_s: float = 30.0
    """Longest pause of all, unless the server asks for a longer one."""

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.longest_s or (self.total_s is not None and self.total_s < 0):
            raise ConfigError("a client's pauses must be > 0, the first no longer than the longest, and the total >= 0")

    def pause(self, attempt: int, asked_s: float, draw: random.Random) -> float:
        """Before trying again for the ``attempt``-th time, counted from 0; ``asked_s`` is the server's Retry-After."""
        jitter = draw.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(attempt, 32)))
        return max(0.0, asked_s) + jitter


FOR_EVER = Patience(total_s=None)


def retry_after(value: str | None, *, now: datetime | None = None) -> float:
    """Seconds that a ``Retry-After`` header asks for, in either of its forms; 0 for none or one that is malformed."""
    if value is None:
        return 0.0
    if value.strip().isdecimal() and len(value.strip()) <= _MOST_DIGITS:
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - (now or datetime.now(timezone.utc))).total_seconds())


def checked_url(url: str, *, plain_http: bool = False) -> str:
    """Without a slash at its end. Raises `ConfigError` for one that is no URL, or would send the token in clear."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"{url!r} is no address of a server: give one like https://features.example:8000")
    if parts.scheme == "http" and not plain_http and not _is_here(parts.hostname):
        raise ConfigError(
            f"{url} is not encrypted, and everybody on the way could read token, images and features: use https://, or "
            "say --plain-http where the network is your own"
        )
    return url.rstrip("/")


def checked_token(token: str) -> str:
    """Without white space around. Raises `ConfigError` for what cannot stand in a header."""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("the token is empty, or holds characters that no token has")
    return token


def read_token(path: str | Path) -> str:
    """The token in a file. Raises `DataError` for one that cannot be read, or that others can read."""
    path = Path(path)
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the token in {path}: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise DataError(f"others can read the token in {path}: chmod 600 {path}")
    try:
        return checked_token(text)
    except ConfigError:
        raise DataError(f"{path} holds no token") from None


def trust(ca: str | Path | None) -> Verify:
    """What certificates are checked against."""
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise DataError(f"cannot read the certificate authority in {ca}: {error}") from error


def untrusted(url: str, error: BaseException) -> str | None:
    """What to say where a server's certificate was the cause, as trying again does not help; None where it was not."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {url} is not trusted ({error}): give the file of the authority that signed it "
                "with --ca"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
