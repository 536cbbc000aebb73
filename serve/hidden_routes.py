"""Serve's own list of routes, kept from whoever asks. Loaded by every proxy, so it imports next to nothing."""

from __future__ import annotations

from typing import Final

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.problems import no_such_task, response_to

ROUTES_PATH: Final = "/-/routes"
"""Where Ray Serve lists every app, and so every task, to whoever asks."""


class HideRoutes:
    """Answers it as a path that is not there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == ROUTES_PATH:
            await response_to(no_such_task())(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """For ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
    return [Middleware(HideRoutes)]
