"""HTTP to one task's server: token, TLS, time-outs, and trying again without doing harm.

A request is tried again after a failure that may pass: no connection, a time-out, 429, 502, 503, 504. Pauses grow by
two and are drawn at random ("full jitter"), so that a thousand devices do not come back in the same second. A
``Retry-After`` is waited for in full. Everything that is sent here may be sent twice: reading changes nothing, and a
training's answers carry a number. Python 3.9.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import random
import ssl
import stat
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Union
from urllib.parse import urlsplit

import httpx

from serve.codec import CodecError, decompress
from serve.edge.errors import AnswerError, NotServedError, RefusedError, UnreachableError
from tasks.errors import ConfigError, DataError

PASSING = frozenset({429, 502, 503, 504})
"""Statuses that may be over when one asks again."""
_SHOWN = 300
"""Characters of a server's explanation that are passed on."""

Verify = Union[bool, ssl.SSLContext]


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


@dataclass(frozen=True)
class Received:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def explanation(self) -> str:
        """What the server says about a refusal: of JSON, its ``detail`` or ``title``."""
        try:
            found = json.loads(self.body)
            text = str(found.get("detail") or found["title"])
        except (ValueError, KeyError, AttributeError):
            text = self.body[: 4 * _SHOWN].decode(errors="replace")
        return text.strip()[:_SHOWN] or "no explanation"


class Link:
    """One keep-alive connection to one server, as the holder of one token. A context manager; for one thread."""

    def __init__(  # noqa: PLR0913 - all but two have a default
        self,
        url: str,
        token: str,
        *,
        ca: str | Path | None = None,
        plain_http: bool = False,
        timeout_s: float = 30.0,
        connect_s: float = 10.0,
        patience: Patience = Patience(),
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ca``: file of the authority that signed the server's certificate, in place of the system's.

        ``plain_http`` allows ``http://`` to another machine, where all on the way can read token and features.
        """
        self.url = checked_url(url, plain_http=plain_http)
        self.patience, self.clock, self._sleep = patience, clock, sleep
        self._draw = random.Random()  # noqa: S311 - for pauses
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {checked_token(token)}", "User-Agent": "metamorphosis-edge"},
            timeout=httpx.Timeout(timeout_s, connect=connect_s),
            verify=trust(ca),
            transport=transport,
        )

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def pause(self, attempt: int) -> None:
        """Before something is asked for the ``attempt``-th time that is not there yet, counted from 0."""
        self._sleep(self.patience.pause(attempt, 0.0, self._draw))

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes = b"",
        max_bytes: int = 1 << 28,
        known: Collection[int] = (),
    ) -> Received:
        """The answer to a request that may be sent twice, unpacked, and never more of it in memory than ``max_bytes``.

        A refusal with a status in ``known`` is an answer like others, for its caller to understand.
        Raises `RefusedError` (401, 403), `NotServedError` (404), `AnswerError` (any other refusal, or an answer that is
        too large) at once, and `UnreachableError` after `Patience.total_s` without an answer.
        """

        def send() -> Received:
            request = self._client.build_request(
                method, path, params=params, headers={"Accept-Encoding": "zstd", **(headers or {})}, content=content
            )
            response = self._client.send(request, stream=True)
            try:
                return _received(response, max_bytes)
            finally:
                response.close()

        return self._persist(send, known)

    def _persist(self, send: Callable[[], Received], known: Collection[int]) -> Received:
        started, attempt = self.clock(), 0
        while True:
            asked_s = 0.0
            try:
                received = send()
            except httpx.TransportError as error:
                if _certificate(error):
                    raise UnreachableError(
                        f"the certificate of {self.url} is not trusted ({error}): give the file of the authority that "
                        "signed it with --ca"
                    ) from error
                told: str = f"{type(error).__name__}: {error}"
            else:
                if received.status not in PASSING:
                    return received if received.status in known else self._accepted(received)
                asked_s = retry_after(received.headers.get("Retry-After"))
                told = f"status {received.status}: {received.explanation}"
            pause_s = self.patience.pause(attempt, asked_s, self._draw)
            waited_s = self.clock() - started
            if self.patience.total_s is not None and waited_s + pause_s > self.patience.total_s:
                raise UnreachableError(f"{self.url} did not answer for {waited_s:.0f} s; the last try gave {told}")
            self._sleep(pause_s)
            attempt += 1

    def _accepted(self, received: Received) -> Received:
        status, told = received.status, received.explanation
        if status < 400:
            return received
        if status in {401, 403}:
            raise RefusedError(
                f"{self.url} does not accept the token ({status}: {told}): it is wrong, expired or revoked. Ask the "
                "producer for a new one"
            )
        if status == 404:
            raise NotServedError(f"{self.url} serves no such task to the holder of this token ({told})")
        raise AnswerError(f"{self.url} refused the request ({status}: {told})")


def retry_after(value: str | None, *, now: datetime | None = None) -> float:
    """Seconds that a ``Retry-After`` header asks for, in either of its forms; 0 for none or one that is malformed."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
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
            f"{url} is not encrypted, and everybody on the way could read token and features: use https://, or say "
            "--plain-http where the network is your own"
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
    return checked_token(text)


def trust(ca: str | Path | None) -> Verify:
    """What certificates are checked against."""
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise DataError(f"cannot read the certificate authority in {ca}: {error}") from error


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _certificate(error: BaseException) -> bool:
    """Whether a certificate was the cause: that does not pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _received(response: httpx.Response, max_bytes: int) -> Received:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise AnswerError(f"the server sends more than the {max_bytes:,} bytes that an answer may have")
    try:
        plain = decompress(bytes(body), response.headers.get("Content-Encoding", ""), max_bytes=max_bytes)
    except CodecError as error:
        raise AnswerError(f"the server's answer cannot be unpacked: {error}") from error
    return Received(response.status_code, response.headers, plain)
