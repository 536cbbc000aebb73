"""The same published task behind other servers: ``python _servers.py KIND PORT HOME`` serves it until it is ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fastapi import FastAPI, Request, Response

CATALOG, TASK = "digits", "loop"


def open_model(home: str) -> Any:
    """The model as it was published, on one core."""
    from orchestrator.catalog import Catalog
    from serve.model import TaskModel

    torch.set_num_threads(1)
    return TaskModel.load(Catalog(f"sqlite:///{home}/mlflow.db", CATALOG), "1", TASK, storage=Path(home), device="cpu")


def answer(model: Any, image: bytes) -> bytes:
    """An image to its feature, as fp16 safetensors: what every server here does."""
    from serve.codec import encode

    return encode({"z": model.features(model.module.pixels(image)[None])}, precision="fp16")


def bare_app(home: str) -> FastAPI:
    """FastAPI and nothing else."""
    app, model = FastAPI(), open_model(home)

    @app.post("/features")
    async def features(request: Request) -> Response:
        return Response(answer(model, await request.body()), media_type="application/x-safetensors")

    return app


def serve_bare(port: int, home: str) -> None:
    import uvicorn

    uvicorn.run(bare_app(home), host="127.0.0.1", port=port, log_level="error", access_log=False)


def serve_litserve(port: int, home: str) -> None:
    """LitServe, one worker."""
    import litserve
    from _litserve import Api

    server = litserve.LitServer(Api(home), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def serve_ray(port: int, home: str) -> None:
    """Ray Serve with nothing set: its own proxy, one replica."""
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0.2}, max_ongoing_requests=64)
    class Default:
        def __init__(self) -> None:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            self.model = open_model(home)

        async def __call__(self, request: Request) -> Response:
            return Response(answer(self.model, await request.body()), media_type="application/x-safetensors")

    run(Default.bind(), port)


def serve_haproxy(port: int, home: str) -> None:
    """The bare app in one replica of Ray Serve behind its HAProxy, without an access log: set up as this is."""
    from ray import serve

    class Bare:
        def __serve_build_asgi_app__(self) -> FastAPI:
            sys.path.insert(0, str(Path(__file__).parent))
            from _servers import bare_app

            return bare_app(home)

    deployment = serve.deployment(name="Bare")(serve.ingress()(Bare)).options(
        ray_actor_options={"num_cpus": 0.2}, max_ongoing_requests=64, logging_config={"enable_access_log": False}
    )
    run(deployment.bind(), port)


def run(app: Any, port: int) -> None:
    """On a Ray of its own, until the process is asked to end: then Serve ends its HAProxy, which would outlive it."""
    import signal

    import ray
    from ray import serve

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app, route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        signal.pause()
    finally:
        serve.shutdown()


if __name__ == "__main__":
    kind, given_port, storage = sys.argv[1:]
    servers = {"bare": serve_bare, "litserve": serve_litserve, "ray": serve_ray, "haproxy": serve_haproxy}
    servers[kind](int(given_port), storage)
