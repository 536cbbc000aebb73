"""What answers below no served task: the same as a task that is somebody else's."""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from serve.operator.routes import Office, add_operator_pages
from serve.problems import no_such_task, problem_of, response_to
from serve.tenants.gate import Gate, Verb


class FrontArgs(BaseModel):
    """What it is made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str
    """File of the tenants' registry."""
    folder: str | None = None
    """Of what serving keeps, for the operator's page; None: there is no page."""
    tls: bool = False
    """Whether clients come by https."""
    pictures: bool = False
    """Whether the page may draw pictures that may show people."""
    pin: str | None = "node:__internal_head__"
    """As of `serve.arguments.ReplicaArgs`."""


def build_front(gate: Gate, office: Office | None = None) -> FastAPI:
    """The app at the root, behind every task's: the operator's page; of all else, admitted or not, nothing.

    What is nothing has no route, so that no method, however odd, is answered otherwise than below a served task.
    """
    front = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    if office is not None:
        add_operator_pages(front, office)

    @front.exception_handler(HTTPException)
    async def nothing(request: Request, _: HTTPException) -> Response:
        path = request.url.path
        task = path.split("/")[2] if path.startswith("/tasks/") else ""
        verb = verb_of(request)
        try:
            admission = await asyncio.to_thread(gate.admit, request.headers.get("authorization"), task=task, verb=verb)
            problem = no_such_task()
            await asyncio.to_thread(gate.audit, admission, task=task, verb=verb, outcome=problem.status)
        except Exception as error:
            problem = problem_of(error)
        return response_to(problem)

    return front


def verb_of(request: Request) -> Verb:
    """Of a request that no route took: what it would have needed, so that it is refused as one that a route took."""
    if request.method == "POST":
        return "publish"
    return "read" if request.url.path.endswith(("/features", "/features/latest", "/stream")) else "metadata"
