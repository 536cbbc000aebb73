"""The Ray Serve shell of `serve.front`: the app at the root. It needs no network, so it loads no torch."""

from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve import Application

from serve.front import build_front
from serve.tenants.gate import Gate


class FrontArgs(BaseModel):
    """What it is made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str
    """File of the tenants' registry."""
    pin: str | None = "node:__internal_head__"
    """As of `serve.arguments.ReplicaArgs`."""


class Front:
    """The app at the root."""

    def __init__(self, args: FrontArgs) -> None:
        self._gate = Gate(Path(args.registry))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_front(self._gate)


def front_app(args: FrontArgs) -> Application:
    """What a Serve config names as ``serve.front_app:front_app``."""
    resources = {} if args.pin is None else {"resources": {args.pin: 0.0001}}
    app: Application = (
        ray_serve.deployment(name="Front")(ray_serve.ingress()(Front))
        .options(ray_actor_options={"num_cpus": 0.1, **resources}, max_ongoing_requests=64)
        .bind(args)
    )
    return app
