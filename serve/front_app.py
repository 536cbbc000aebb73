"""The Ray Serve shell of `serve.front`: the app at the root. It needs no network, so it loads no torch.

What the operator's page shows of networks comes from a deployment of its own beside it, which loads them when somebody
looks.
"""

from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve.deployment.statuses import app_statuses
from serve.front import FrontArgs, build_front
from serve.operator.app import RemoteViewer, ViewerArgs, viewer
from serve.operator.page import AppState
from serve.operator.routes import Office
from serve.tenants.gate import Gate
from serve.traffic import traffic_folder

TASK_APP: Final = "task-"
"""What the names of task apps begin with; see `serve.arguments.task_app_name`."""


class Front:
    """The app at the root."""

    def __init__(self, args: FrontArgs, viewer_handle: DeploymentHandle[Any] | None = None) -> None:
        self._gate = Gate(Path(args.registry))
        self._office = None
        if args.folder is not None and viewer_handle is not None:
            self._office = Office(
                gate=self._gate,
                viewer=RemoteViewer(viewer_handle),
                traffic=traffic_folder(Path(args.folder)),
                states=task_states,
                tls=args.tls,
            )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_front(self._gate, self._office)


def task_states() -> dict[str, AppState]:
    """Every task's app by the task."""
    return {
        name.removeprefix(TASK_APP): AppState(
            state=app.state,
            replicas=", ".join(f"{n} {state.lower()}" for state, n in app.replicas.items()),
            message=app.message,
        )
        for name, app in app_statuses().items()
        if name.startswith(TASK_APP)
    }


def front_app(args: FrontArgs) -> Application:
    """What a Serve config names as ``serve.front_app:front_app``."""
    resources = {} if args.pin is None else {"resources": {args.pin: 0.0001}}
    looks = None
    if args.folder is not None:
        looks = viewer(ViewerArgs(folder=args.folder, pictures=args.pictures), resources)
    app: Application = (
        ray_serve.deployment(name="Front")(ray_serve.ingress()(Front))
        .options(ray_actor_options={"num_cpus": 0.1, **resources}, max_ongoing_requests=64)
        .bind(args, looks)
    )
    return app
