"""From the command to features over HTTP, on a cluster of its own: each step is a command, as a user types it."""

from __future__ import annotations

import json
import threading
import time

import httpx
import numpy as np
import psutil
import pytest
from deployed import Operator
from served import Shop, digit_images, png

from serve.codec import decode, media_type
from serve.deployment.head import HeadFile

FP32 = {"Accept": media_type("fp32")}


class Publishing:
    """Sends one image after the other to a task, and remembers every status."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.statuses: list[int | str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url, headers))

    def _run(self, url: str, headers: dict[str, str]) -> None:
        body = png(digit_images(1)[0])
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                try:
                    self.statuses.append(client.post(f"{url}/features", content=body, headers=headers).status_code)
                except httpx.HTTPError as error:
                    self.statuses.append(repr(error))
                time.sleep(0.05)

    def __enter__(self) -> Publishing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


def same_but_for_time(response: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    kept = {name: value for name, value in response.headers.items() if name not in {"date", "x-request-id"}}
    return response.status_code, response.content, kept


def check_that_nobody_is_told_what_is_there(url: str) -> None:
    tasks = [f"{url}/tasks/{task}" for task in ("loop", "digit", "nothing")]
    for headers in ({}, {"Authorization": "Bearer mm_0000000000000000_x"}):
        for path in ("features", "features/latest", "stream", "metadata", "healthz", "openapi.json", "x"):
            refused = [httpx.get(f"{task}/{path}", headers=headers) for task in tasks]
            assert {response.status_code for response in refused} == {401}
            assert len({response.content for response in refused}) == 1
    for path in ("/-/routes", "/-/routes/", "/-/ROUTES"):
        assert "loop" not in httpx.get(url + path).text


def check_features(url: str, headers: dict[str, str], wanted: np.ndarray) -> None:
    """Of the first digits, published one after the other."""
    for image, z in zip(digit_images(len(wanted)), wanted, strict=True):
        response = httpx.post(f"{url}/features", content=png(image), headers=headers | FP32, timeout=30)
        assert response.status_code == 200, response.text
        found = decode(response.content, max_bytes=1 << 20, max_values=1 << 18)[0]["z"][0]
        np.testing.assert_allclose(found, z, atol=2**-9 * float(np.abs(wanted).max()))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tasks_are_served_updated_rolled_back_and_removed_each_alone(operator: Operator, shop_template, tmp_path):
    told = operator.deploy("up", "loop,digit", "--encoder-version", "1", "--port", str(operator.port))
    assert f"{operator.url}/tasks/loop" in told and f"{operator.url}/tasks/digit" in told
    with Shop(shop_template, tmp_path / "state") as shop:
        first, second = shop.model("loop"), shop.model("loop", "2")
        wanted = {task: shop.model(task).features(digit_images(4)) for task in ("loop", "digit", "large")}
    with Shop(operator.home, operator.home) as shop:
        camera = shop.token("camera", "device", loop=["publish"], digit=["publish"], large=["publish"])
        alice = shop.token("alice", "tenant", loop=["read", "metadata"])
    loop, digit = f"{operator.url}/tasks/loop", f"{operator.url}/tasks/digit"

    # What comes out is what the library gives.
    check_features(loop, camera, wanted["loop"])
    check_features(digit, camera, wanted["digit"])
    read = httpx.get(f"{loop}/features", headers=alice | FP32, params={"limit": 9})
    arrays, text = decode(read.content, max_bytes=1 << 24, max_values=1 << 20)
    assert arrays["sequence"].tolist() == [1, 2, 3, 4] and text["version"] == first.module.card.version
    assert httpx.get(f"{loop}/metadata", headers=alice).json()["guarantee"] == first.module.card.guarantee

    unknown = httpx.get(f"{operator.url}/tasks/nothing/features", headers=alice)
    assert unknown.status_code == 404
    assert same_but_for_time(httpx.get(f"{digit}/features", headers=alice)) == same_but_for_time(unknown)
    check_that_nobody_is_told_what_is_there(operator.url)

    # A third one, whose encoder is an app of its own.
    operator.deploy("up", "large", "--encoder-version", "1", "--shared-encoder")
    check_features(f"{operator.url}/tasks/large", camera, wanted["large"])
    operator.deploy("down", "large")

    # Another version of one task: the other one does not notice.
    before = {task: operator.replicas(task) for task in ("loop", "digit")}
    assert all(len(pids) == 1 for pids in before.values())
    with Publishing(digit, camera) as publishing:
        operator.deploy("update", "loop", "--encoder-version", "2")
    assert set(publishing.statuses) == {200} and len(publishing.statuses) > 20
    assert operator.replicas("digit") == before["digit"] and not operator.replicas("loop") & before["loop"]
    published = httpx.post(f"{loop}/features", content=png(digit_images(1)[0]), headers=camera, timeout=30)
    assert published.headers["x-feature-version"] == second.module.card.version

    # What cannot be done is refused in a line, and changes nothing.
    assert "no encoder '9'" in operator.deploy("update", "loop", "--encoder-version", "9", status=2)
    assert "never served" in operator.deploy("up", "parity", "--encoder-version", "1", status=2)
    assert "cannot be moved" in operator.deploy("up", "large", "--encoder-version", "1", "--port", "1", status=2)

    told = operator.deploy("rollback", "loop")
    assert first.module.card.version in told
    published = httpx.post(f"{loop}/features", content=png(digit_images(1)[0]), headers=camera, timeout=30)
    assert published.headers["x-feature-version"] == first.module.card.version

    operator.deploy("down", "loop")
    assert same_but_for_time(httpx.get(f"{loop}/features", headers=alice)) == same_but_for_time(unknown)
    status = json.loads(operator.deploy("status", "--json"))
    assert list(status["tasks"]) == ["digit"] and status["tasks"]["digit"]["state"] == "RUNNING"
    assert operator.replicas("digit") == before["digit"]

    family = psutil.Process(HeadFile(operator.home / "serving").read().pid).children(recursive=True)
    operator.deploy("down", "--all")
    with pytest.raises(httpx.ConnectError):
        httpx.get(operator.url)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert HeadFile(operator.home / "serving").read() is None
