"""What somebody who asked is told. It never says whether a task, a tenant or a token exists."""

from __future__ import annotations

from typing import Final

from orchestrator.errors import UserError

NOT_AUTHENTICATED: Final = 401
SPENT: Final = 403
NOT_FOUND: Final = 404
TOO_MANY: Final = 429

TITLES: Final = {
    NOT_AUTHENTICATED: "no valid token was given",
    SPENT: "the quota of this task is used up",
    NOT_FOUND: "there is no such task for this token",
    TOO_MANY: "too many requests",
}


class Refused(UserError):  # noqa: N818 - it is a refusal, and reads as one
    """A request that may not be answered.

    401: no token, or none that is valid; 404: the token has no grant for this verb of this task, which is also the
    answer where there is no such task; 403: a quota that is not renewed, of a task that was granted; 429: too many
    requests a minute. All that may be told to who asked is in ``status``, ``title`` and ``retry_after``.
    """

    def __init__(self, status: int, title: str, retry_after: float | None = None) -> None:
        super().__init__(status, title, retry_after)
        self.status, self.title = status, title
        self.retry_after = retry_after
        """Seconds after which asking again is worth it; None: it is not."""

    def __str__(self) -> str:
        return self.title

    @classmethod
    def because(cls, status: int, retry_after: float | None = None) -> Refused:
        """With the one title that this status has."""
        return cls(status, TITLES[status], retry_after)
