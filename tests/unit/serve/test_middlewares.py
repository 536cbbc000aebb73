"""What stands before Serve: the list of routes is hidden, and publications go past Serve to the app of the replica."""

from __future__ import annotations

import inspect

import pytest
from served import AppClient, digit_images, png
from starlette.middleware import Middleware

from serve import middlewares
from serve.api import build_api
from serve.deployment.environment import Entrance, serve_environment
from serve.middlewares import HideRoutes, Publications, take_publications


async def serves_own(scope, receive, send):
    """What Serve would answer."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"loop"})


@pytest.fixture(autouse=True)
def nobody_takes_any(monkeypatch):
    monkeypatch.setattr(middlewares, "_OWN", {})


@pytest.mark.parametrize(("path", "status"), [("/-/routes", 404), ("/-/routes/", 404), ("/-/healthz", 200)])
def test_serves_list_of_routes_is_hidden(path, status):
    assert AppClient(HideRoutes(serves_own)).get(path).status_code == status


def test_publications_go_past_serve_and_nothing_else_does(shop):
    camera = shop.token("camera", "device", loop=["publish"])
    client = AppClient(Publications(serves_own))
    request = {"content": png(digit_images(1)[0]), "headers": camera}
    assert client.post("/tasks/loop/features", **request).content == b"loop", "as long as nobody takes them"

    take_publications("/tasks/loop", build_api(shop.service("loop")))
    answer = client.post("/tasks/loop/features?x=1", **request)
    assert answer.status_code == 200 and answer.headers["X-Features"].startswith("1-1 of")
    assert client.post("/tasks/loop/features", content=request["content"]).status_code == 401
    others = [("GET", "/tasks/loop/features"), ("POST", "/tasks/loop"), ("POST", "/tasks/digit/features")]
    for method, path in [*others, ("POST", "/tasks/loop/features/"), ("GET", "/tasks/loop/stream")]:
        assert client.request(method, path, headers=camera).content == b"loop"


@pytest.mark.filterwarnings("ignore")  # of Ray's own code, when it is loaded
def test_ray_puts_them_before_what_a_replica_listens_with(monkeypatch, tmp_path):
    import ray.serve  # noqa: F401 - its parts import one another
    from ray.serve._private import http_util, replica
    from ray.serve.config import HTTPOptions

    chosen = serve_environment(Entrance(), tmp_path)["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    monkeypatch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", chosen)
    found = http_util.configure_http_middlewares(HTTPOptions()).middlewares
    assert [each.cls for each in found if isinstance(each, Middleware)][-2:] == [Publications, HideRoutes]
    starts = inspect.getsource(replica.Replica._maybe_start_direct_ingress_servers)
    assert "configure_http_middlewares(" in starts
