"""Who is signed in. A browser proves who it is once, with a token; from then on with a cookie that lives for a while.

    signed out -> signed in -> ended (signed out, expired, or the token is accepted no more)

The cookie is a random name for what is kept here, in the memory of the process: a restart ends every session. The token
is kept, so that every request goes through the gate as any other does: one that is revoked opens nothing from the next
request on. Neither token nor cookie is written anywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

LIFETIME_S: Final = 30 * 60.0
"""From signing in. What is done meanwhile does not prolong it."""
_MOST: Final = 64
"""Sessions at once; the oldest goes first."""
_SECRET_BYTES: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One browser."""

    authorization: str = field(repr=False)
    """The header that the gate is asked with."""
    operator: str
    form_token: str = field(repr=False)
    """What every form of this session carries, and no other page can know."""
    expires: float
    """Unix time."""

    def sent(self, form_token: str | None) -> bool:
        """Whether a form was one of this session's, in a time that does not depend on the answer."""
        return form_token is not None and hmac.compare_digest(form_token.encode(), self.form_token.encode())


class Sessions:
    """All of one process. Used by one thread: that of the event loop."""

    def __init__(self, *, lifetime_s: float = LIFETIME_S, clock: Callable[[], float] = time.time) -> None:
        self.lifetime_s, self._clock = lifetime_s, clock
        self._known: dict[bytes, Session] = {}

    def begin(self, authorization: str, operator: str) -> tuple[str, Session]:
        """A new session, and the secret of its cookie."""
        self._forget_expired()
        while len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        session = Session(
            authorization=authorization,
            operator=operator,
            form_token=secrets.token_urlsafe(_SECRET_BYTES),
            expires=self._clock() + self.lifetime_s,
        )
        self._known[_key(secret)] = session
        return secret, session

    def find(self, secret: str | None) -> Session | None:
        """The session of a cookie, while it lasts."""
        session = None if secret is None else self._known.get(_key(secret))
        return session if session is not None and self._clock() < session.expires else None

    def end(self, secret: str | None) -> None:
        """At once. One that is not known is none."""
        if secret is not None:
            self._known.pop(_key(secret), None)

    def _forget_expired(self) -> None:
        now = self._clock()
        self._known = {key: session for key, session in self._known.items() if now < session.expires}


def _key(secret: str) -> bytes:
    """What a secret is looked up by: how long that takes tells nothing of secrets that are known."""
    return hashlib.sha256(b"operator session\0" + secret.encode()).digest()
