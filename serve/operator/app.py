"""The Ray Serve shell of `serve.operator.viewer`: a deployment beside the app at the root, and a handle of it.

A replica reserves no CPU and loads nothing before somebody opens the page.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from orchestrator.errors import UnavailableError
from serve.operator.views import Look, Served, Unreadable
from serve.problems import busy

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from serve.operator.viewer import CatalogViewer

T = TypeVar("T")

_AT_ONCE: Final = 8
"""Requests that a replica takes, and as many that wait."""


class ViewerArgs(BaseModel):
    """What it is made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Of what serving keeps."""
    pictures: bool = False
    """See `serve.operator.viewer.CatalogViewer`."""


class LazyViewer:
    """`serve.operator.views.Viewer` that is made when it is first asked."""

    def __init__(self, args: ViewerArgs) -> None:
        self._args, self._lock = args, threading.Lock()
        self._made: CatalogViewer | None = None

    async def served(self) -> Served:
        """See `serve.operator.views.Viewer.served`."""
        return await (await self._viewer()).served()

    async def look(self, *, sample: int, image: bytes | None) -> Look | Unreadable:
        """See `serve.operator.views.Viewer.look`."""
        return await (await self._viewer()).look(sample=sample, image=image)

    async def _viewer(self) -> CatalogViewer:
        return await asyncio.to_thread(self._make)

    def _make(self) -> CatalogViewer:
        with self._lock:
            if self._made is None:
                import torch

                from serve.operator.viewer import CatalogViewer

                torch.set_num_threads(1)
                path = Path(self._args.folder) / "deployments.json"
                self._made = CatalogViewer(path, pictures=self._args.pictures)
            return self._made


class RemoteViewer:
    """`serve.operator.views.Viewer` behind a handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def served(self) -> Served:
        """See `serve.operator.views.Viewer.served`."""
        return await _answered(self._handle.served.remote())

    async def look(self, *, sample: int, image: bytes | None) -> Look | Unreadable:
        """See `serve.operator.views.Viewer.look`."""
        return await _answered(self._handle.look.remote(sample=sample, image=image))


async def _answered(response: Awaitable[T]) -> T:
    try:
        return await response
    except BackPressureError:
        raise busy("several looks are under way") from None
    except (RayActorError, DeploymentUnavailableError):
        raise UnavailableError("the viewer was lost, and is started again: try again in a moment") from None


def viewer(args: ViewerArgs, resources: dict[str, Any]) -> Application:
    """For the app at the root; ``resources`` as of its own replicas."""
    app: Application = (
        ray_serve.deployment(name="Viewer")(LazyViewer)
        .options(
            ray_actor_options={"num_cpus": 0, **resources},
            max_ongoing_requests=_AT_ONCE,
            max_queued_requests=_AT_ONCE,
        )
        .bind(args)
    )
    return app
