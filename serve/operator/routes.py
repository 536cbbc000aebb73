"""The routes of the operator's page, added to the app at the root. Needs neither Ray nor a cluster.

    GET  /                  the page, or the way to /login
    GET  /login             the form
    POST /login             a token, for a cookie
    POST /logout            the end of the session
    GET  /look?sample=7     the live look alone, at a digit
    POST /look              the same, at the image in the body
    GET  /traffic           the numbers alone
    GET  /operator.css, .js of the page; whoever asks may have them

Every request asks the gate, with the token that the session was begun with. A form is taken only from a page of this
server: by what the browser says of its origin, by a cookie that it sends to nobody else's forms, and by a secret in the
form.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.requests import ClientDisconnect

from orchestrator.errors import MetaMorphosisError
from serve.bodies import read_body
from serve.operator.page import (
    HEADERS,
    STATIC,
    AppState,
    Page,
    login_html,
    look_html,
    message_html,
    page_html,
    static_file,
    traffic_html,
)
from serve.operator.sessions import Session, Sessions
from serve.operator.views import Look, Served, Unreadable, Viewer
from serve.problems import Problem, busy, problem_of, response_to
from serve.tenants.errors import Refused
from serve.tenants.gate import EVERY_TASK, Admission, Gate
from serve.traffic import read_traffic

_FORM_BYTES: Final = 4096
_BODY_S: Final = 10.0
_VIEW_S: Final = 55.0
"""In which the page must be there: below what Serve waits."""
_NOT_YOURS: Final = "this token does not open this page"
_FOREIGN: Final = "the form did not come from this page"
_DIGITS: Final = 9
"""Of a sample's number."""
_GONE: Final = 499
"""What is counted where a client left before it was answered."""


@dataclass(frozen=True, kw_only=True)
class Office:
    """What the page is made from."""

    gate: Gate
    viewer: Viewer
    traffic: Path
    """Folder of request counts."""
    states: Callable[[], Mapping[str, AppState]] = field(default=dict)
    """How every task's app is; may wait."""
    tls: bool = False
    """Whether browsers come by https only, even where a proxy in front takes it off."""
    max_body_bytes: int = 8 << 20
    """Of an image that is brought."""
    sessions: Sessions = field(default_factory=Sessions)


@dataclass(frozen=True, slots=True)
class _Operator:
    """Who asks, for one request."""

    session: Session
    admission: Admission


class _SignedOut(Exception):  # noqa: N818 - it is a state
    """There is no session, or it ended."""


Handler = Callable[[Request, _Operator], Awaitable[Response]]


def add_operator_pages(api: FastAPI, office: Office) -> None:
    """Add the routes. Before any route that takes every path."""
    desk = _Desk(office)

    @api.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await desk.answer(request, desk.page)

    @api.get("/login", include_in_schema=False)
    async def login_form(request: Request) -> Response:
        return _with_headers(HTMLResponse(login_html()))

    @api.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        return await desk.login(request)

    @api.post("/logout", include_in_schema=False)
    async def logout(request: Request) -> Response:
        return await desk.answer(request, desk.logout)

    @api.get("/look", include_in_schema=False)
    async def look(request: Request) -> Response:
        return await desk.answer(request, desk.look)

    @api.post("/look", include_in_schema=False)
    async def look_at(request: Request) -> Response:
        return await desk.answer(request, desk.look_at)

    @api.get("/traffic", include_in_schema=False)
    async def traffic(request: Request) -> Response:
        return await desk.answer(request, desk.traffic, written=False)

    for name in STATIC:
        api.add_api_route(f"/{name}", _file(name), methods=["GET"], include_in_schema=False)


class _Desk:
    """One way for every request: signed in, admitted, answered, written down."""

    def __init__(self, office: Office) -> None:
        self._office, self._sessions = office, office.sessions

    async def answer(self, request: Request, handler: Handler, *, written: bool = True) -> Response:
        """What the handler says, to an operator; to others the way to the form, or a refusal where no page is asked."""
        operator: _Operator | None = None
        try:
            operator = await self._operator(request)
            response = await handler(request, operator)
        except _SignedOut:
            problem = Problem(HTTPStatus.UNAUTHORIZED, "nobody is signed in")
            response = _to("/login") if _wants_page(request) else response_to(problem)
            self._forget(request, response)
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except Exception as error:
            response = _refusal(request, problem_of(error))
        if operator is not None and written:
            await self._write(operator.admission, response.status_code, f"{request.method} {request.url.path}")
        return _with_headers(response)

    # -- in and out ----------------------------------------------------------------------------------------------------

    async def login(self, request: Request) -> Response:
        """A cookie for an operator's token; the form again for any other."""
        try:
            _check_origin(request)
            token = (await _form(request)).get("token", "").strip()
            authorization = f"Bearer {token}"
            admission = await self._admit(authorization)
        except Refused as error:
            told = _NOT_YOURS if error.retry_after is None else f"{error.title}: try again in a minute"
            return _with_headers(HTMLResponse(login_html(fault=told), status_code=HTTPStatus.UNAUTHORIZED))
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except Exception as error:
            return _with_headers(_refusal(request, problem_of(error)))
        response = _to("/")
        self._forget(request, response)
        secret, _ = self._sessions.begin(authorization, admission.tenant)
        response.set_cookie(
            self._cookie(request),
            secret,
            max_age=int(self._sessions.lifetime_s),
            path="/",
            secure=self._is_secure(request),
            httponly=True,
            samesite="strict",
        )
        await self._write(admission, HTTPStatus.OK, "signed in")
        return _with_headers(response)

    async def logout(self, request: Request, operator: _Operator) -> Response:
        """The end of this browser's session."""
        self._check_form(request, operator, (await _form(request)).get("form_token"))
        response = _to("/login")
        self._forget(request, response)
        return response

    # -- what is shown -------------------------------------------------------------------------------------------------

    async def page(self, request: Request, operator: _Operator) -> Response:
        """All of it; with a look where a sample is named."""
        sample = _sample(request)
        found = await self._page(operator, sample=sample or 1, look=sample is not None)
        return HTMLResponse(page_html(found))

    async def look(self, request: Request, operator: _Operator) -> Response:
        """At a digit."""
        return HTMLResponse(look_html(await self._page(operator, sample=_sample(request) or 1, look=True)))

    async def look_at(self, request: Request, operator: _Operator) -> Response:
        """At the image in the body."""
        self._check_form(request, operator, request.headers.get("x-form-token"))
        image = await read_body(request, max_bytes=self._office.max_body_bytes, seconds=_BODY_S)
        return HTMLResponse(look_html(await self._page(operator, sample=1, look=True, image=image)))

    async def traffic(self, request: Request, operator: _Operator) -> Response:
        """The numbers that change."""
        return HTMLResponse(traffic_html(await asyncio.to_thread(read_traffic, self._office.traffic)))

    async def _page(self, operator: _Operator, *, sample: int, look: bool, image: bytes | None = None) -> Page:
        served, fault = await self._served()
        return Page(
            session=operator.session,
            served=served,
            fault=fault,
            states=await asyncio.to_thread(self._office.states),
            traffic=await asyncio.to_thread(read_traffic, self._office.traffic),
            sample=sample,
            look=await self._looked(sample, image) if look else None,
        )

    async def _served(self) -> tuple[Served | None, str]:
        """None, and why, where it cannot be described: the rest of the page is there all the same."""
        try:
            async with asyncio.timeout(_VIEW_S / 2):
                return await self._office.viewer.served(), ""
        except MetaMorphosisError as error:
            return None, str(error)
        except TimeoutError:
            return None, "the viewer does not answer in time: it may still be loading. Try again"

    async def _looked(self, sample: int, image: bytes | None) -> Look | Unreadable:
        try:
            async with asyncio.timeout(_VIEW_S / 2):
                return await self._office.viewer.look(sample=sample, image=image)
        except MetaMorphosisError as error:
            return Unreadable(str(error))
        except TimeoutError:
            raise busy("the look took too long: the networks may still be loading") from None

    # -- who asks ------------------------------------------------------------------------------------------------------

    async def _operator(self, request: Request) -> _Operator:
        """Raises `_SignedOut`, also where the token is accepted no more, and `Refused` for too many requests."""
        secret = request.cookies.get(self._cookie(request))
        session = self._sessions.find(secret)
        if session is None:
            raise _SignedOut
        try:
            return _Operator(session, await self._admit(session.authorization))
        except Refused as error:
            if error.retry_after is not None:
                raise
            raise _SignedOut from None

    async def _admit(self, authorization: str) -> Admission:
        return await asyncio.to_thread(self._office.gate.admit, authorization, task=EVERY_TASK, verb="operate")

    async def _write(self, admission: Admission, outcome: int, detail: str) -> None:
        await asyncio.to_thread(
            self._office.gate.audit, admission, task=EVERY_TASK, verb="operate", outcome=outcome, detail=detail
        )

    def _check_form(self, request: Request, operator: _Operator, form_token: str | None) -> None:
        _check_origin(request)
        if not operator.session.sent(form_token):
            raise Problem(HTTPStatus.FORBIDDEN, _FOREIGN)

    def _forget(self, request: Request, response: Response) -> None:
        """The session of the request's cookie, and the cookie."""
        name = self._cookie(request)
        if (secret := request.cookies.get(name)) is not None:
            self._sessions.end(secret)
            response.delete_cookie(name, path="/", secure=self._is_secure(request), httponly=True, samesite="strict")

    def _is_secure(self, request: Request) -> bool:
        return self._office.tls or request.url.scheme == "https"

    def _cookie(self, request: Request) -> str:
        """Its name. With the prefix, browsers take it by https only, and from no other host."""
        return "__Host-mm-operator" if self._is_secure(request) else "mm-operator"


def _check_origin(request: Request) -> None:
    """Raise `Problem` unless the browser says that a page of this very server sent it.

    Only browsers that trust the connection send the first header, and all of them the second.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None and site != "same-origin":
        raise Problem(HTTPStatus.FORBIDDEN, _FOREIGN)
    if origin is None or urlsplit(origin).netloc != request.headers.get("host"):
        raise Problem(HTTPStatus.FORBIDDEN, _FOREIGN)


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small form; of those that are named twice the first."""
    body = await read_body(request, max_bytes=_FORM_BYTES, seconds=_BODY_S)
    try:
        return {name: values[0] for name, values in parse_qs(body.decode("ascii"), max_num_fields=8).items()}
    except ValueError:
        raise Problem(HTTPStatus.BAD_REQUEST, "the form is not right") from None


def _sample(request: Request) -> int | None:
    """The number that is asked for. Raises `Problem` for what is none."""
    asked = request.query_params.get("sample")
    if asked is None:
        return None
    if not asked.isascii() or not asked.isdecimal() or len(asked) > _DIGITS:
        raise Problem(HTTPStatus.BAD_REQUEST, "a parameter is not right", "sample")
    return int(asked)


def _wants_page(request: Request) -> bool:
    """Whether a browser goes there, rather than the page's own script."""
    return request.url.path in {"/", "/logout"}


def _refusal(request: Request, problem: Problem) -> Response:
    """For people where they went there, for programs else."""
    response = response_to(problem)
    if not _wants_page(request) and request.url.path != "/login":
        return response
    html = message_html(problem.title, problem.detail)
    kept = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
    return HTMLResponse(html, status_code=response.status_code, headers=kept)


def _to(path: str) -> Response:
    return RedirectResponse(path, status_code=HTTPStatus.SEE_OTHER)


def _with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return _with_headers(Response(static_file(name), media_type=STATIC[name]))

    return answer
