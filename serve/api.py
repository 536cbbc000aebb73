"""The HTTP routes of one task: a FastAPI app around a `TaskService`. Needs neither Ray nor a cluster.

Every route asks the gate first; so does whatever is no route. Bodies are read piece by piece and no further than they
may be. An error says what is wrong with the request, and nothing of the server.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Annotated, Any, Final, cast

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.bodies import read_body
from serve.front import verb_of
from serve.openapi import DESCRIPTION, ERRORS, FEATURES, IMAGE, METADATA, NOTHING_NEW, STREAM, with_security
from serve.problems import Problem, no_such_task, problem_of, response_to
from serve.service import STREAM_TYPE, Form, Page, TaskService
from serve.tenants.gate import Admission, Refused, Verb

_GONE: Final = 499
"""What is counted where a client left before it was answered."""

Version = Annotated[str | None, Query(max_length=64, description="Only features of this version.")]
After = Annotated[int, Query(ge=0, le=2**63 - 1, description="The last sequence number that is known already.")]
Handler = Callable[[Admission], Awaitable[Response]]


def build_api(service: TaskService) -> FastAPI:
    """The routes, below wherever the app is mounted."""
    api = FastAPI(
        title=f"Features of task {service.task}",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect comes before the gate, and says that there is a task
    )
    answers = _Answers(service)

    async def publish(request: Request) -> Response:
        async def answer(admission: Admission) -> Response:
            form = _form(request)
            limits = service.limits
            page = await service.publish(
                admission, form, lambda: read_body(request, max_bytes=limits.max_body_bytes, seconds=limits.body_s)
            )
            return _page(page)

        return await answers.to(request, "publish", answer, features=1)

    api.router.add_api_route(
        "/features",
        publish,
        methods=["POST"],
        **FEATURES,
        openapi_extra=IMAGE,
        summary="Publish an image's feature",
        route_class_override=_PlainRoute,
    )

    @api.get("/features/latest", **NOTHING_NEW, summary="The newest feature")
    async def latest(request: Request, version: Version = None) -> Response:
        async def answer(admission: Admission) -> Response:
            return _page(await service.latest(admission, _form(request), version))

        return await answers.to(request, "read", answer)

    @api.get("/features", **NOTHING_NEW, summary="The features after a sequence number")
    async def after(
        request: Request,
        after: After = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="Features at most; the server may send fewer.")] = 16,
        wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for the first one.")] = 0.0,
        version: Version = None,
    ) -> Response:
        async def answer(admission: Admission) -> Response:
            form = _form(request)
            page = await service.after(admission, form, sequence=after, limit=limit, wait_s=wait, version=version)
            return _page(page)

        return await answers.to(request, "read", answer)

    @api.get("/stream", **STREAM, summary="Features as they come")
    async def stream(request: Request, after: After = 0, version: Version = None) -> Response:
        async def answer(admission: Admission) -> Response:
            form = Form(precision=_form(request).precision, encoding="identity")
            await service.check_version(version)
            bodies = service.stream(admission, form, sequence=after, version=version)
            media_type = f"{STREAM_TYPE};precision={form.precision}"
            return StreamingResponse(_until_refused(bodies), media_type=media_type, headers=_HEADERS)

        return await answers.to(request, "read", answer)

    @api.get("/metadata", **METADATA, summary="What the feature is, and what is promised of it")
    async def metadata(request: Request, version: Version = None) -> Response:
        async def answer(_: Admission) -> Response:
            return JSONResponse(service.metadata(version), headers=_HEADERS)

        return await answers.to(request, "metadata", answer)

    @api.get(
        "/healthz",
        status_code=HTTPStatus.NO_CONTENT,
        responses=ERRORS,
        response_class=Response,
        summary="Whether the task answers",
    )
    async def healthz(request: Request) -> Response:
        async def answer(_: Admission) -> Response:
            return Response(status_code=HTTPStatus.NO_CONTENT, headers=_HEADERS)

        return await answers.to(request, "metadata", answer)

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        async def answer(_: Admission) -> Response:
            return JSONResponse(schema_of(api, request.scope.get("root_path", "")), headers=_HEADERS)

        return await answers.to(request, "metadata", answer)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        async def answer(_: Admission) -> Response:
            names = sorted({str(part["loc"][-1]) for part in error.errors()})
            raise Problem(HTTPStatus.BAD_REQUEST, "a parameter is not right", ", ".join(names))

        return await answers.to(request, verb_of(request), answer)

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        async def answer(_: Admission) -> Response:
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, "there is no such method here")
            raise no_such_task()

        return await answers.to(request, verb_of(request), answer)

    return api


def schema_of(api: FastAPI, root_path: str) -> dict[str, Any]:
    """The OpenAPI schema of an app that is mounted there."""
    servers = [{"url": root_path}] if root_path else None
    found = get_openapi(title=api.title, version="1", description=DESCRIPTION, routes=api.routes, servers=servers)
    return with_security(found)


class _PlainRoute(APIRoute):
    """Of an endpoint that takes the request as it is: there is nothing that FastAPI should look for in it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself."""
        return cast("Callable[[Request], Coroutine[Any, Any, Response]]", self.endpoint)


class _Answers:
    """One way for every request: admitted, answered, counted, written down."""

    def __init__(self, service: TaskService) -> None:
        self._service = service

    async def to(self, request: Request, verb: Verb, answer: Handler, *, features: int = 0) -> Response:
        started = time.perf_counter()
        admission: Admission | None = None
        refused = False
        try:
            admission = await self._service.admit(request.headers.get("authorization"), verb, features=features)
            response = await answer(admission)
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except Exception as error:
            response, refused = response_to(problem_of(error)), isinstance(error, Refused)
        # What the gate refuses, and what was released, is written down already.
        if admission is not None and not refused and not isinstance(response, _Released):
            await self._service.audit(admission, verb, response.status_code)
        self._service.meter.request(
            tenant="" if admission is None else admission.tenant,
            task=self._service.task,
            verb=verb,
            status=response.status_code,
            seconds=time.perf_counter() - started,
        )
        return response


_HEADERS: Final = {"Cache-Control": "no-store"}


def _form(request: Request) -> Form:
    return Form.of(request.headers.get("accept", ""), request.headers.get("accept-encoding", ""))


class _Released(Response):
    """A page of features, which was written down where it was released."""

    def __init__(self, page: Page) -> None:
        told = {"Vary": "Accept, Accept-Encoding", "X-Features": page.numbers}
        super().__init__(page.body, headers={**_HEADERS, **page.headers, **told})


def _page(page: Page | None) -> Response:
    if page is None:
        return Response(status_code=HTTPStatus.NO_CONTENT, headers=_HEADERS)
    return _Released(page)


async def _until_refused(bodies: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream that ends where it may not go on: its head is out already, so nothing else can be said."""
    try:
        async for body in bodies:
            yield body
    except Exception as error:
        problem_of(error)
