"""What is said to somebody whose request is not answered: `application/problem+json` (RFC 9457), and nothing inside."""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Final

from starlette.responses import Response

from orchestrator.errors import LedgerError, NonFiniteFeatureError
from serve.tenants.errors import NOT_FOUND, Refused

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
_BUSY_S: Final = 1


class Problem(Exception):  # noqa: N818 - the word of the RFC
    """A request that is not answered, in a status and words that may be told to anybody who was let in."""

    def __init__(self, status: int, title: str, detail: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(status, title, detail)
        self.status, self.title, self.detail, self.retry_after = status, title, detail, retry_after


def no_such_task() -> Problem:
    """The same words as the gate's: a task that is not there and one that is somebody else's look alike."""
    refused = Refused.because(NOT_FOUND)
    return Problem(refused.status, refused.title)


def busy(title: str = "the server is busy") -> Problem:
    """Asking again soon is worth it."""
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, title, retry_after=_BUSY_S)


def problem_of(error: Exception) -> Problem:
    """What may be said of an error. What nobody foresaw is logged, and told as a bare 500."""
    match error:
        case Problem():
            return error
        case Refused():
            return Problem(error.status, error.title, retry_after=error.retry_after)
        case NonFiniteFeatureError():
            return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the image has no finite feature")
        case LedgerError():
            logger.error("nothing is released: %s", error)
            return busy("what is released cannot be written down now, so nothing is")
        case _:
            logger.error("a request failed", exc_info=error)
            return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed")


def response_to(problem: Problem) -> Response:
    """As it goes out."""
    content = {"status": int(problem.status), "title": problem.title}
    if problem.detail:
        content["detail"] = problem.detail
    headers = {"Cache-Control": "no-store"}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(content), problem.status, headers, MEDIA_TYPE)
