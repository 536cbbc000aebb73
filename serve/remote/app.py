"""The one endpoint of a remote training: ``POST /tasks/<task>/training``, an answer up and the next work down.

status  when
200     the next work
204     nothing to do yet: come again
400     the answer cannot be read; the work waits for a better one
401     no valid token              404  no such training for this token
409     another process of the same tenant has taken over
412     the work that If-Match names is not the one at hand: come again without an answer
413     a body larger than the answer can be
429     too many requests: see Retry-After
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from orchestrator.errors import ProtocolError
from serve.bodies import discard_body
from serve.codec import MEDIA_TYPE, CodecError, compress, decompress
from serve.remote.exchange import Exchange, StaleAnswerError, TakenOverError
from serve.remote.messages import ENVELOPE_BYTES, Reply, Work
from serve.tenants.errors import NOT_FOUND, TITLES, Refused

POLL_S: Final = 20.0
"""How long a request waits for work before it is told to come again."""
_BODY_S: Final = 120.0
"""In which a body has to be there."""
_DISCARDED_BYTES: Final = 1 << 30
"""Read at most of a body that is not wanted: who is not through with sending does not see what is answered."""


class Admitted(Protocol):
    """`serve.tenants.gate.Admission`, as far as it is needed here."""

    def recheck(self) -> None:
        """Raises `Refused` where it would not be let in any more."""
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

    def enter(self, authorization: str | None, task: str) -> None:
        """Raises `Refused`."""
        who = hashlib.sha256(f"{task}\n{authorization or ''}".encode()).digest()
        if (admission := self._inside.get(who)) is None:
            admission = self._gate.admit(authorization, task=task, verb="train")
            self._gate.audit(admission, task=task, verb="train", outcome=200, detail="began to train")
            self._inside[who] = admission
            return
        try:
            admission.recheck()
        except Refused:
            del self._inside[who]
            raise


class TooLargeError(Exception):
    """A body that is larger than the answer can be."""


def training_app(exchanges: Mapping[str, Exchange], gate: Admits, *, poll_s: float = POLL_S) -> FastAPI:
    """The application, for the tasks that are in ``exchanges`` at the time of a request."""
    app, door = FastAPI(title="MetaMorphosis remote training", docs_url=None, redoc_url=None), Door(gate)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/tasks/{task}/training")
    async def training(task: str, request: Request) -> Response:  # noqa: PLR0911 - one a status
        try:
            door.enter(request.headers.get("authorization"), task)
        except Refused as error:
            after = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
            return _refusal(error.status, error.title, after)
        exchange = exchanges.get(task)
        if exchange is None:
            return _refusal(NOT_FOUND, TITLES[NOT_FOUND])
        try:
            reply = await _read(request, values=exchange.room_for(request.headers.get("if-match", "")))
            exchange.take(reply)
        except StaleAnswerError as error:
            await discard_body(request, max_bytes=_DISCARDED_BYTES, seconds=_BODY_S)
            return _refusal(412, str(error))
        except TooLargeError:
            return _refusal(413, "the body is larger than the answer can be")
        except TimeoutError:
            return _refusal(408, "the body did not come in time")
        except TakenOverError as error:
            return _refusal(409, str(error))
        except (ProtocolError, CodecError) as error:
            return _refusal(400, str(error))
        work = await _next(exchange, poll_s)
        if work is None:
            return Response(status_code=204)
        return await _packed(work, reply, request.headers.get("accept-encoding", ""))

    return app


async def _read(request: Request, *, values: int) -> Reply:
    """The body, never more of it in memory than an answer of so many numbers can have."""
    most = 4 * values + ENVELOPE_BYTES
    body = bytearray()
    async with asyncio.timeout(_BODY_S):
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise TooLargeError
    encoding = request.headers.get("content-encoding", "")
    plain = decompress(bytes(body), encoding, max_bytes=most)
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


async def _packed(work: Work, reply: Reply, accepted: str) -> Response:
    encoding: Any = "zstd" if "zstd" in accepted else "identity"
    pack: Callable[[], bytes] = lambda: compress(work.to_bytes(reply.precision), encoding)  # noqa: E731
    small = sum(array.nbytes for array in work.arrays.values()) < ENVELOPE_BYTES
    body = pack() if small else await asyncio.to_thread(pack)
    headers = {"Cache-Control": "no-store"} | ({"Content-Encoding": encoding} if encoding != "identity" else {})
    return Response(body, media_type=MEDIA_TYPE, headers=headers)


def _refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"detail": detail}, status_code=status, headers=dict(headers or {}))
