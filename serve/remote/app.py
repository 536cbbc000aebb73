"""The one endpoint of a remote training: ``POST /tasks/<task>/training``, an answer up and the next work down.

Refusals are `application/problem+json`, as everywhere (`serve.problems`), and the gate is asked before anything else,
of this path and of any other.

status  when
200     the next work
204     nothing to do yet: come again
400     the answer cannot be read; the work waits for a better one
401     no valid token              404  no such training for this token
403     the bits of the task are used up, and the training is over
405     any method but POST
408     a body that did not come in time
409     another process of the same tenant has taken over
412     the work that If-Match names is not the one at hand: come again without an answer
413     a body larger than the answer can be
429     too many requests: see Retry-After
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal, Protocol

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from orchestrator.errors import BitBudgetExceededError, ProtocolError
from serve.bodies import read_encoded_body
from serve.codec import MEDIA_TYPE, CodecError, compress, decompress
from serve.problems import Problem, no_such_task, problem_of, response_to
from serve.remote.exchange import Exchange, StaleAnswerError, TakenOverError
from serve.remote.messages import ENVELOPE_BYTES, Reply, Work
from serve.tenants.errors import Refused

POLL_S: Final = 20.0
"""How long a request waits for work before it is told to come again."""
_BODY_S: Final = 120.0
"""In which a body has to be there."""
_READ_BYTES: Final = 1 << 30
"""Of a body that is not wanted: who is not through with sending does not see what is answered."""
_GONE: Final = 499
"""Of a request that nobody waits for any more: seen by nobody."""
_HEADERS: Final = {"Cache-Control": "no-store"}


class Admitted(Protocol):
    """`serve.tenants.gate.Admission`, as far as it is needed here."""

    def recheck(self) -> None:
        """Raises `Refused` where it would not be let in any more."""
        ...

    def charge_training(
        self, digests: Sequence[bytes], version: str, bits_per_release: float, *, releases: int = 0
    ) -> None:
        """Book bits, or raise `Refused`."""
        ...


class Admits(Protocol):
    """`serve.tenants.gate.Gate`, as far as it is needed here."""

    def admit(self, authorization: str | None, *, task: str, verb: Literal["train"]) -> Admitted:
        """Raises `Refused`."""
        ...

    def audit(self, admission: Any, *, task: str, verb: str, outcome: int, detail: str = "") -> None:
        """Write down what came of it."""
        ...


class Door:
    """Lets a tenant in once, as to a stream, and from then on looks at every request whether it still may.

    A step is a request: counted as such, training would be over at the minute's quota.
    """

    def __init__(self, gate: Admits) -> None:
        self._gate, self._inside = gate, dict[bytes, Admitted]()

    def enter(self, authorization: str | None, task: str) -> Admitted:
        """Raises `Refused`."""
        who = hashlib.sha256(f"{task}\n{authorization or ''}".encode()).digest()
        if (admission := self._inside.get(who)) is None:
            admission = self._gate.admit(authorization, task=task, verb="train")
            self._gate.audit(admission, task=task, verb="train", outcome=200, detail="began to train")
            self._inside[who] = admission
            return admission
        try:
            admission.recheck()
        except Refused:
            self._inside.pop(who, None)
            raise
        return admission


def training_app(exchanges: Mapping[str, Exchange], gate: Admits, *, poll_s: float = POLL_S) -> FastAPI:
    """The application, for the tasks that are in ``exchanges`` at the time of a request."""
    app, door = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False), Door(gate)

    @app.post("/tasks/{task}/training")
    async def training(task: str, request: Request) -> Response:
        try:
            admission = door.enter(request.headers.get("authorization"), task)
            exchange = exchanges.get(task)
            if exchange is None:
                raise no_such_task()
            reply = await _read(request, exchange)
            exchange.take(reply)
            work = await _next(exchange, poll_s)
            if work is None:
                return Response(status_code=HTTPStatus.NO_CONTENT, headers=_HEADERS)
            await _charge(admission, work, exchange)
            return await _packed(work, reply, request.headers.get("accept-encoding", ""))
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except Exception as error:
            return response_to(_problem(error))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        task = path.split("/")[2] if path.startswith("/tasks/") else ""
        try:
            admission = gate.admit(request.headers.get("authorization"), task=task, verb="train")
            problem = no_such_task()
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                problem = Problem(HTTPStatus.METHOD_NOT_ALLOWED, "there is no such method here")
            gate.audit(admission, task=task, verb="train", outcome=problem.status)
        except Exception as refusal:
            problem = problem_of(refusal)
        return response_to(problem)

    return app


def _problem(error: Exception) -> Problem:
    """What a tenant is told of it."""
    match error:
        case StaleAnswerError():
            return Problem(HTTPStatus.PRECONDITION_FAILED, str(error))
        case TakenOverError():
            return Problem(HTTPStatus.CONFLICT, str(error))
        case ProtocolError() | CodecError():
            return Problem(HTTPStatus.BAD_REQUEST, "the message is not right", str(error))
        case _:
            return problem_of(error)


async def _read(request: Request, exchange: Exchange) -> Reply:
    """The message, never more of it in memory than it can have. Raises `StaleAnswerError` after reading it in vain."""
    try:
        values = exchange.room_for(request.headers.get("if-match", ""))
    except StaleAnswerError:
        with contextlib.suppress(Problem):
            await read_encoded_body(request, max_bytes=0, seconds=_BODY_S, read_bytes=_READ_BYTES)
        raise
    most = 4 * values + ENVELOPE_BYTES
    body = await read_encoded_body(request, max_bytes=most, seconds=_BODY_S, read_bytes=_READ_BYTES)
    plain = decompress(body, request.headers.get("content-encoding", ""), max_bytes=most)
    return Reply.from_bytes(plain, max_bytes=most, max_values=values + ENVELOPE_BYTES)


async def _next(exchange: Exchange, poll_s: float) -> Work | None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + poll_s
    while True:
        work, ready = exchange.first()
        left_s = deadline - loop.time()
        if work is not None or left_s <= 0 or exchange.over:
            return work
        await asyncio.wait([asyncio.wrap_future(ready)], timeout=left_s)


async def _charge(admission: Admitted, work: Work, exchange: Exchange) -> None:
    """Book what the work tells before it goes out; again it is free. Raises `Refused`, and the session hears why."""
    if (of := work.releases) is None:
        return
    try:
        await asyncio.to_thread(
            admission.charge_training, of.digests, of.version, of.bits_per_release, releases=of.planned
        )
    except Refused as refusal:
        if isinstance(refusal.__cause__, BitBudgetExceededError):
            whole = f" ({of.planned} features, {of.planned * of.bits_per_release:g} bits)" if of.planned else ""
            told = f"no more of the training{whole} is sent to the tenant of task {exchange.task!r}"
            exchange.withhold(work, ProtocolError(f"{told}: {refusal.__cause__}"))
        raise


async def _packed(work: Work, reply: Reply, accepted: str) -> Response:
    encoding: Any = "zstd" if "zstd" in accepted else "identity"
    pack: Callable[[], bytes] = lambda: compress(work.to_bytes(reply.precision), encoding)  # noqa: E731
    small = sum(array.nbytes for array in work.arrays.values()) < ENVELOPE_BYTES
    body = pack() if small else await asyncio.to_thread(pack)
    headers = _HEADERS | ({"Content-Encoding": encoding} if encoding != "identity" else {})
    return Response(body, media_type=MEDIA_TYPE, headers=headers)
