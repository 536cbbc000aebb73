"""What stands before Serve in each process of its that listens. Loaded by all of them, so it imports next to nothing.

These are its proxies and, where HAProxy is in front, every replica: there Serve wraps its own code around each request,
which counts it for Serve's queue and for autoscaling, makes tasks of it and looks up its route once more. What a device
publishes needs none of it: `serve.service` has limits and times of its own, the audit log and the meters have each one,
and a replica that ends waits for what its listener took. So publications go to the replica's app directly. Whatever
else is asked goes Serve's way, above all that of readers, whom it ends when they go away.
"""

from __future__ import annotations

from typing import Final

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.problems import no_such_task, response_to

ROUTES_PATH: Final = "/-/routes"
"""Where Ray Serve lists every app, and so every task, to whoever asks."""
_OWN: Final[dict[str, tuple[str, ASGIApp]]] = {}
"""Apps of this process by the path of their publications, each with the route that it is below."""


def take_publications(route: str, app: ASGIApp) -> None:
    """From now on ``POST {route}/features`` goes to this app, where this process listens itself."""
    _OWN[f"{route}/features"] = route, app


class Publications:
    """Goes past Serve with what a device publishes. In a process that has no such app, it does nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST" and (own := _OWN.get(scope["path"])) is not None:
            route, app = own
            await app({**scope, "root_path": route}, receive, send)
        else:
            await self._app(scope, receive, send)


class HideRoutes:
    """Answers Serve's own list of routes as a path that is not there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == ROUTES_PATH:
            await response_to(no_such_task())(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
    return [Middleware(Publications), Middleware(HideRoutes)]
