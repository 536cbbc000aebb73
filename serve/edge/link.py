"""HTTP to one task's server: token, TLS, time-outs, and trying again without doing harm.

A request is tried again after a failure that may pass: no connection, a time-out, 429, 502, 503, 504. Pauses grow by
two and are drawn at random ("full jitter"), so that a thousand devices do not come back in the same second. A
``Retry-After`` is waited for in full. Everything that is sent here may be sent twice: reading changes nothing, and a
training's answers carry a number. Python 3.9.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve.codec import CodecError, decompress
from serve.connection import (
    FOR_EVER,
    Patience,
    checked_token,
    checked_url,
    read_token,
    retry_after,
    trust,
    untrusted,
)
from serve.edge.errors import AnswerError, NotServedError, RefusedError, UnreachableError

__all__ = ["FOR_EVER", "Link", "Patience", "Received", "read_token"]

PASSING = frozenset({429, 502, 503, 504})
"""Statuses that may be over when one asks again."""
_SHOWN = 300
"""Characters of a server's explanation that are passed on."""


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
        patience: Patience = Patience(),  # noqa: B008 - frozen
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
        patience: Patience | None = None,
    ) -> Received:
        """The answer to a request that may be sent twice, unpacked, and never more of it in memory than ``max_bytes``.

        A refusal with a status in ``known`` is an answer like others, for its caller to understand.
        ``patience`` in place of the link's own. Raises `RefusedError` (401, 403), `NotServedError` (404), `AnswerError`
        (any other refusal, or an answer that is too large) at once, and `UnreachableError` after `Patience.total_s`
        without an answer.
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

        return self._persist(send, known, patience or self.patience)

    def _persist(self, send: Callable[[], Received], known: Collection[int], patience: Patience) -> Received:
        started, attempt = self.clock(), 0
        while True:
            asked_s = 0.0
            try:
                received = send()
            except httpx.TransportError as error:
                if (reason := untrusted(self.url, error)) is not None:
                    raise UnreachableError(reason) from error
                told: str = f"{type(error).__name__}: {error}"
            else:
                if received.status not in PASSING:
                    return received if received.status in known else self._accepted(received)
                asked_s = retry_after(received.headers.get("Retry-After"))
                told = f"status {received.status}: {received.explanation}"
            pause_s = patience.pause(attempt, asked_s, self._draw)
            waited_s = self.clock() - started
            if patience.total_s is not None and waited_s + pause_s > patience.total_s:
                raise UnreachableError(f"{self.url} did not answer for {waited_s:.0f} s; the last try gave {told}")
            self._sleep(pause_s)
            attempt += 1

    def _accepted(self, received: Received) -> Received:
        status, told = received.status, received.explanation
        if status < 400:
            return received
        if status == 401:
            raise RefusedError(
                f"{self.url} does not accept the token (401: {told}): it is wrong, expired or revoked. Ask the "
                "producer for a new one"
            )
        if status == 403:
            raise RefusedError(f"{self.url} gives this tenant no more (403: {told}): ask the producer")
        if status == 404:
            raise NotServedError(f"{self.url} serves no such task to the holder of this token ({told})")
        raise AnswerError(f"{self.url} refused the request ({status}: {told})")


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
