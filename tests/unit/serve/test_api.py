"""One task over HTTP, without a cluster: what is answered, to whom, in which form, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
import struct
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from served import SIZE, AppClient, digit_images, png

from orchestrator.errors import LedgerError, NonFiniteFeatureError
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from serve.api import build_api, schema_of
from serve.codec import MEDIA_TYPE, PRECISIONS, decode, media_type
from serve.service import Lane, Lanes, ServiceLimits
from serve.streams import FeatureStore
from serve.tenants.audit import AuditLog

FP32 = {"Accept": media_type("fp32")}


@pytest.fixture
def camera(shop) -> dict[str, str]:
    return shop.token("camera", "device", loop=["publish"], digit=["publish"])


@pytest.fixture
def alice(shop) -> dict[str, str]:
    return shop.token("alice", "tenant", loop=["read", "metadata"])


@pytest.fixture
def loop(shop) -> AppClient:
    return shop.client("loop")


def features(response) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    assert response.status_code == 200, response.text
    return decode(response.content, max_bytes=1 << 24, max_values=1 << 22)


def problem(response, status: int, words: str) -> dict:
    assert response.status_code == status, response.content
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told["status"] == status and words in told["title"] and told.keys() <= {"status", "title", "detail"}
    return told


# -- publishing and reading --------------------------------------------------------------------------------------------


def test_the_tenant_reads_what_the_librarys_model_gives_for_the_published_image(shop, loop, camera, alice):
    images = digit_images(3)
    for n, image in enumerate(images, 1):
        arrays, text = features(loop.post("/features", content=png(image), headers=camera | FP32))
        assert (arrays["sequence"].tolist(), text["last"]) == ([n], str(n))
    wanted = shop.model("loop").features(images)
    read, text = features(loop.get("/features", params={"after": 1, "limit": 9}, headers=alice | FP32))
    np.testing.assert_allclose(read["z"], wanted[1:], atol=2**-9 * float(np.abs(wanted).max()))
    assert read["sequence"].tolist() == [2, 3] and (np.diff(read["time_ms"]) >= 0).all()
    assert text["task"] == "loop" and (text["last"], text["oldest"]) == ("3", "1")
    assert text["version"] == shop.model("loop").module.card.version
    newest, _ = features(loop.get("/features/latest", headers=alice | FP32))
    np.testing.assert_array_equal(newest["z"][0], read["z"][-1])


@pytest.mark.parametrize("side", [SIZE, 64, 65, 300])
def test_an_image_of_any_size_is_the_librarys_whichever_thread_decodes_it(shop, loop, camera, side):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    arrays, _ = features(loop.post("/features", content=png(image), headers=camera | FP32))
    model = shop.model("loop")
    wanted = model.features(model.module.pixels(png(image))[None])
    np.testing.assert_allclose(arrays["z"], wanted, atol=2**-9 * float(np.abs(wanted).max()))


def test_images_that_come_together_are_charged_one_by_one_and_told_their_own(shop, loop, camera):
    shop.registry.set_features("camera", "loop", 5)
    images = digit_images(8)
    requests = [("POST", "/features", {"content": png(image), "headers": camera | FP32}) for image in images]
    answers = asyncio.run(loop.all(requests))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [403] * 3
    wanted, numbers = shop.model("loop").features(images), []
    for answer, z in zip(answers, wanted, strict=True):
        if answer.status_code == 200:
            arrays, _ = features(answer)
            np.testing.assert_allclose(arrays["z"][0], z, atol=2**-9 * float(np.abs(wanted).max()))
            numbers += arrays["sequence"].tolist()
    assert sorted(numbers) == [1, 2, 3, 4, 5]
    (grant,) = (grant for grant in shop.registry.tenant("camera").grants if grant.task == "loop")
    assert grant.features == 5
    with AuditLog(shop.places.audit) as log:
        assert sorted(line.outcome for line in log.lines()) == [200] * 5 + [403] * 3
        assert log.verify().lines == 8


def test_before_anything_was_published_there_is_nothing(loop, alice):
    for path in ("/features", "/features/latest"):
        assert loop.get(path, headers=alice).status_code == 204


def test_precision_and_compression_are_negotiated(loop, camera, alice):
    loop.post("/features", content=png(digit_images(1)[0]), headers=camera)
    exact, _ = features(loop.get("/features", headers=alice | FP32))
    sizes = {}
    for precision in PRECISIONS:
        response = loop.get("/features", headers=alice | {"Accept": media_type(precision), "Accept-Encoding": "zstd"})
        assert response.headers["content-type"] == media_type(precision)
        assert response.headers["content-encoding"] == "zstd"  # httpx has unpacked it
        sizes[precision] = len(response.content)
        arrays, _ = features(response)
        np.testing.assert_allclose(arrays["z"], exact["z"], atol=float(np.abs(exact["z"]).max()) / 200)
    assert sizes["fp32"] > 1.7 * sizes["fp16"] and sizes["fp16"] > sizes["int8"]
    plain = loop.get("/features", headers=alice | {"Accept": "*/*", "Accept-Encoding": ""})
    assert plain.headers["content-type"] == f"{MEDIA_TYPE};precision=fp16"
    assert "content-encoding" not in plain.headers and plain.headers["cache-control"] == "no-store"


def test_what_is_not_accepted_is_told_before_any_feature_is_charged(loop, alice, camera, shop):
    loop.post("/features", content=png(digit_images(1)[0]), headers=camera)
    told = problem(loop.get("/features", headers=alice | {"Accept": "application/json"}), 406, "accepted")
    assert "fp16" in told["detail"]
    assert shop.registry.tenant("alice").grants[0].features == 0


def test_a_waiting_reader_is_told_as_soon_as_something_is_published(shop, camera, alice):
    app = build_api(shop.service("loop"))
    client = AppClient(app)

    async def both():
        waiting = asyncio.create_task(
            client.all([("GET", "/features", {"params": {"wait": 20}, "headers": alice, "timeout": 30})])
        )
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await client.all([("POST", "/features", {"content": png(digit_images(1)[0]), "headers": camera})])
        return (await asyncio.wait_for(waiting, 5))[0]

    assert features(asyncio.run(both()))[0]["sequence"].tolist() == [1]


def test_a_stream_gives_features_and_signs_of_life_and_ends(shop, camera, alice):
    client = shop.client("loop", limits=ServiceLimits(stream_s=0.5, heartbeat_s=0.1))
    for image in digit_images(3):
        client.post("/features", content=png(image), headers=camera)
    response = client.get("/stream", params={"after": 1}, headers=alice | FP32)
    assert response.headers["content-type"] == f"{MEDIA_TYPE}-stream;precision=fp32"
    bodies, rest = [], response.content
    while rest:
        (length,) = struct.unpack(">I", rest[:4])
        bodies.append(rest[4 : 4 + length])
        rest = rest[4 + length :]
    assert decode(bodies[0], max_bytes=1 << 24, max_values=1 << 22)[0]["sequence"].tolist() == [2, 3]
    assert 2 <= len(bodies) <= 8 and set(bodies[1:]) == {b""}


def test_a_stream_ends_when_the_token_is_revoked(shop, camera, alice):
    client = shop.client("loop", limits=ServiceLimits(stream_s=20, heartbeat_s=0.05))

    async def both():
        reading = asyncio.create_task(client.all([("GET", "/stream", {"headers": alice, "timeout": 30})]))
        await asyncio.sleep(0.3)
        shop.registry.revoke("alice")
        return (await asyncio.wait_for(reading, 5))[0]

    assert set(asyncio.run(both()).content) <= {0}


# -- who may -----------------------------------------------------------------------------------------------------------


ROUTES = [
    ("POST", "/features", "publish"),
    ("GET", "/features", "read"),
    ("GET", "/features/latest", "read"),
    ("GET", "/stream", "read"),
    ("GET", "/metadata", "metadata"),
    ("GET", "/healthz", "metadata"),
    ("GET", "/openapi.json", "metadata"),
]


def test_the_table_below_has_every_route(loop):
    found = {(method, route.path) for route in loop.app.routes for method in route.methods if method != "HEAD"}
    assert found == {(method, path) for method, path, _ in ROUTES}


@pytest.mark.parametrize(("method", "path", "verb"), ROUTES)
def test_every_route_asks_the_gate_for_its_verb(shop, method, path, verb):
    loop = shop.client("loop", limits=ServiceLimits(stream_s=0.1))
    for other in ("read", "metadata", "train", "publish"):
        role = "device" if other == "publish" else "tenant"
        headers = shop.token(f"may-{other}", role, loop=[other])
        response = loop.request(method, path, headers=headers, content=png(digit_images(1)[0]))
        if other == verb:
            assert response.status_code < 300, response.text
        else:
            problem(response, 404, "no such task for this token")
    problem(loop.request(method, path), 401, "no valid token")


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/features/7", "/metadata/x", "/docs", "/redoc", "/features?after=x"]
)
def test_what_is_no_route_is_not_told_from_one_that_is_somebody_elses(shop, loop, path, alice):
    eve = shop.token("eve", "tenant", large=["read", "metadata"])
    problem(loop.get(path), 401, "no valid token")
    problem(loop.get(path, headers=eve), 404, "no such task for this token")
    if "?" not in path:
        problem(loop.get(path, headers=alice), 404, "no such task for this token")


def test_a_version_that_never_was_looks_like_a_task_that_is_not_there(loop, alice):
    for path in ("/features", "/features/latest", "/stream", "/metadata"):
        problem(loop.get(path, params={"version": "9.9-000000000000"}, headers=alice), 404, "no such task")


def test_the_quota_of_features_is_spent_by_reading(shop, loop, camera, alice):
    shop.registry.set_features("alice", "loop", 2)
    for image in digit_images(3):
        loop.post("/features", content=png(image), headers=camera)
    assert features(loop.get("/features", params={"limit": 2}, headers=alice))[0]["z"].shape[0] == 2
    problem(loop.get("/features", params={"after": 2}, headers=alice), 403, "quota")
    assert shop.registry.tenant("alice").grants[0].features == 2


def test_bits_are_spent_once_for_an_image_and_end_with_the_budget(shop, camera):
    shop.token("bob", "tenant", digit=["read"])
    bob = {"Authorization": f"Bearer {shop.registry.rotate('bob').token.text}"}
    digit = shop.client("digit")
    one, two, three = (png(image) for image in digit_images(3))
    for file in (one, two, one, three):
        digit.post("/features", content=file, headers=camera)
    with BitLedger(shop.places.bits) as ledger:
        ledger.set_limit("bob", "digit", 8.0)
        read, _ = features(digit.get("/features", params={"limit": 3}, headers=bob | FP32))
        np.testing.assert_array_equal(read["z"][0], read["z"][2])
        assert ledger.spent("bob", "digit") == pytest.approx(8)
        features(digit.get("/features", params={"limit": 3}, headers=bob))
        assert ledger.spent("bob", "digit") == pytest.approx(8), "reading again tells nothing new"
        problem(digit.get("/features", params={"after": 3}, headers=bob), 403, "quota")
        assert ledger.spent("bob", "digit") == pytest.approx(8)
        assert ledger.spent("camera", "digit") == 0


def test_a_bounded_feature_that_is_in_the_stream_is_not_computed_again(shop, camera):
    lane, computed = shop.lane("digit"), []

    def infer(images, digests):
        computed.extend(digests.sha256)
        return lane.infer(images, digests)

    digit = shop.client("digit", lanes=Lanes(current=Lane(module=lane.module, infer=infer)))
    one, two = (png(image) for image in digit_images(2))
    bodies = [features(digit.post("/features", content=file, headers=camera | FP32))[0] for file in (one, two, one)]
    assert len(computed) == 2
    np.testing.assert_array_equal(bodies[0]["z"], bodies[2]["z"])


def test_with_fresh_noise_an_image_that_comes_again_is_another_draw_and_costs_again(shop, camera):
    bob = shop.token("bob", "tenant", digit=["read"])
    lane = shop.lane("digit")
    lane.module.release = replace(lane.module.release, fresh=True)
    digit = shop.client("digit", lanes=Lanes(current=lane))
    file = png(digit_images(1)[0])
    with BitLedger(shop.places.bits) as ledger:
        ledger.set_limit("bob", "digit", 8)
        first, second = (features(digit.post("/features", content=file, headers=camera | FP32))[0]["z"] for _ in "12")
        assert (first != second).mean() > 0.5
        for _ in range(2):
            assert features(digit.get("/features", headers=bob | FP32))[0]["z"].shape[0] == 2
            assert ledger.spent("bob", "digit") == pytest.approx(8), "what is read again is the same draw"
        digit.post("/features", content=file, headers=camera)
        problem(digit.get("/features", params={"after": 2}, headers=bob), 403, "quota")


def test_without_a_limit_of_bits_nothing_that_is_bounded_is_released(shop, camera):
    bob = shop.token("bob", "tenant", digit=["read"])
    digit = shop.client("digit")
    digit.post("/features", content=png(digit_images(1)[0]), headers=camera)
    problem(digit.get("/features", headers=bob), 403, "quota")


def test_requests_are_written_down_with_numbers_and_without_contents(shop, loop, camera, alice):
    loop.post("/features", content=png(digit_images(1)[0]), headers=camera)
    loop.get("/features", headers=alice)
    with AuditLog(shop.places.audit) as log:
        lines = [(line.tenant, line.verb, line.outcome, line.detail) for line in log.lines()]
    version = shop.model("loop").module.card.version
    assert ("camera", "publish", 200, f"1-1 of version {version}") in lines
    assert ("alice", "read", 200, f"1-1 of version {version}") in lines


# -- what is sent ------------------------------------------------------------------------------------------------------


def gif_of_size(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"GIF89a",
        b"%PDF-1.4",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
        bytes(1000),
        b"%!PS-Adobe\n",
        gif_of_size(9999, 9999),
    ],
)
def test_what_is_no_image_is_refused_and_published_nowhere(loop, camera, alice, body):
    problem(loop.post("/features", content=body, headers=camera), 415, "no image")
    assert loop.get("/features", headers=alice).status_code == 204


def test_an_image_of_too_many_pixels_is_refused(shop, camera):
    client = shop.client("loop", limits=ServiceLimits(max_pixels=10_000))
    told = problem(client.post("/features", content=png(np.zeros((101, 100, 3), np.uint8)), headers=camera), 415, "")
    assert "10,000" in told["detail"]


def test_a_body_that_is_too_large_is_refused_announced_or_not(shop, camera):
    client = shop.client("loop", limits=ServiceLimits(max_body_bytes=1000))

    async def pieces():
        for _ in range(11):
            yield bytes(100)

    problem(client.post("/features", content=bytes(1001), headers=camera), 413, "1,000 bytes")
    problem(client.post("/features", content=pieces(), headers=camera), 413, "1,000 bytes")
    problem(client.post("/features", content=bytes(1000), headers=camera), 415, "no image")


def test_a_body_that_is_too_slow_is_refused(shop, camera):
    client = shop.client("loop", limits=ServiceLimits(body_s=0.1))

    async def pieces():
        yield b"GIF"
        await asyncio.sleep(5)

    problem(client.post("/features", content=pieces(), headers=camera), 408, "too slow")


def test_an_image_under_a_content_encoding_is_refused(loop, camera):
    headers = camera | {"Content-Encoding": "gzip"}
    problem(loop.post("/features", content=b"x", headers=headers), 415, "content encoding")


@pytest.mark.parametrize(
    "query", ["after=-1", "after=x", "limit=0", "limit=1001", "wait=nan", "wait=61", "version=" + "v" * 65]
)
def test_parameters_are_checked(loop, alice, query):
    told = problem(loop.get(f"/features?{query}", headers=alice), 400, "parameter")
    assert told["detail"] == query.partition("=")[0]


def test_more_images_at_once_than_allowed_are_told_to_come_again(shop, camera):
    lane = shop.lane("loop")

    def slow(images, digests):
        time.sleep(0.3)
        return lane.infer(images, digests)

    limits = ServiceLimits(max_inflight=2)
    client = shop.client("loop", limits=limits, lanes=Lanes(current=Lane(module=lane.module, infer=slow)))
    request = ("POST", "/features", {"content": png(digit_images(1)[0]), "headers": camera})
    answers = asyncio.run(client.all([request] * 5))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert problem(busy, 503, "busy") and busy.headers["retry-after"] == "1"


def test_a_device_that_publishes_alone_waits_for_no_thread_and_several_are_computed_together(shop, camera):
    lane, seen = shop.lane("loop"), []

    def watched(images, digests):
        seen.append((len(images), threading.current_thread() is threading.main_thread()))
        return lane.infer(images, digests)

    service = shop.service("loop", lanes=Lanes(current=Lane(module=lane.module, infer=watched)))
    client = AppClient(build_api(service))
    service._publications._alone_s = 0.0  # however slow this machine is
    request = ("POST", "/features", {"content": png(digit_images(1)[0]), "headers": camera})
    features(client.request(*request[:2], **request[2]))
    assert seen == [(1, True)]
    service._publications._alone_s = 0.0
    for answer in asyncio.run(client.all([request] * 3)):
        features(answer)
    assert sum(n for n, _ in seen[1:]) == 3 and not any(here for _, here in seen[1:])
    seen.clear()
    service._publications._alone_s = 0.0
    features(client.request(*request[:2], **request[2]))
    assert seen == [(1, False)], "others were there a moment ago"
    service._met -= 1.0
    service._publications._alone_s = 0.0
    features(client.request(*request[:2], **request[2]))
    assert seen[1:] == [(1, True)]


def test_a_network_that_takes_too_long_is_given_up_and_what_it_still_gives_is_not_charged_or_told(shop, camera):
    lane, go_on, done = shop.lane("loop"), threading.Event(), threading.Event()

    def stuck(images, digests):
        go_on.wait(60)
        found = lane.infer(images, digests)
        done.set()
        return found

    shop.registry.set_features("camera", "loop", 5)
    lanes = Lanes(current=Lane(module=lane.module, infer=stuck))
    client = shop.client("loop", limits=ServiceLimits(infer_s=0.1), lanes=lanes)
    request = {"content": png(digit_images(1)[0]), "headers": camera}
    problem(client.post("/features", **request), 503, "busy")
    go_on.set()
    assert done.wait(10)
    answer = client.post("/features", **request)
    assert answer.headers["X-Features"].startswith("1-1 of"), "the stream begins with what was told"
    (grant,) = (g for g in shop.registry.tenant("camera").grants if g.task == "loop")
    assert grant.features == 1


def test_what_is_charged_in_time_is_told_however_long_the_disk_takes(shop, camera, monkeypatch):
    append = FeatureStore.append

    def slow(*args):
        time.sleep(0.5)
        return append(*args)

    monkeypatch.setattr(FeatureStore, "append", slow)
    client = shop.client("loop", limits=ServiceLimits(infer_s=0.3))
    features(client.post("/features", content=png(digit_images(1)[0]), headers=camera))


def test_an_encoder_elsewhere_that_takes_too_long_is_given_up(shop, camera):
    async def stuck(pixels, digest):
        await asyncio.sleep(60)

    lanes = Lanes(current=replace(shop.lane("loop"), encode=stuck))
    client = shop.client("loop", limits=ServiceLimits(infer_s=0.1), lanes=lanes)
    problem(client.post("/features", content=png(digit_images(1)[0]), headers=camera), 503, "busy")


def test_images_that_come_while_others_are_computed_are_computed_together_each_by_its_version(shop, camera):
    batches = []

    def counted(lane):
        def infer(images, digests):
            batches.append(len(images))
            time.sleep(0.3)
            return lane.infer(images, digests)

        return replace(lane, infer=infer)

    models = [shop.model("loop", version) for version in "12"]
    lanes = Lanes(current=counted(shop.lane("loop")), canary=counted(shop.lane("loop", "2")), share=0.5)
    client = shop.client("loop", lanes=lanes)
    images = digit_images(12)
    requests = [("POST", "/features", {"content": png(image), "headers": camera | FP32}) for image in images]
    for image, answer in zip(images, asyncio.run(client.all(requests)), strict=True):
        arrays, text = features(answer)
        (model,) = (m for m in models if m.module.card.version == text["version"])
        wanted = model.features(image[None])
        np.testing.assert_allclose(arrays["z"], wanted, atol=2**-9 * float(np.abs(wanted).max()))
    assert sum(batches) == 12 and len(batches) <= 5


def test_one_image_without_a_feature_does_not_spoil_the_batch(shop, camera):
    lane = shop.lane("loop")

    def infer(images, digests):
        time.sleep(0.2)
        if (images == 7).all(axis=(1, 2, 3)).any():
            raise NonFiniteFeatureError("inf")
        return lane.infer(images, digests)

    client = shop.client("loop", lanes=Lanes(current=replace(lane, infer=infer)))
    images = digit_images(4)
    images[2] = 7
    requests = [("POST", "/features", {"content": png(image), "headers": camera | FP32}) for image in images]
    answers = asyncio.run(client.all(requests))
    problem(answers.pop(2), 422, "no finite feature")
    for image, answer in zip(images[[0, 1, 3]], answers, strict=True):
        wanted = shop.model("loop").features(image[None])
        np.testing.assert_allclose(features(answer)[0]["z"], wanted, atol=2**-9 * float(np.abs(wanted).max()))


def test_an_image_that_comes_twice_at_once_is_sampled_once(shop, camera):
    lane, computed = shop.lane("digit"), []

    def infer(images, digests):
        computed.extend(digests.sha256)
        time.sleep(0.2)
        return lane.infer(images, digests)

    client = shop.client("digit", lanes=Lanes(current=replace(lane, infer=infer)))
    other, same = digit_images(2)
    requests = [("POST", "/features", {"content": png(x), "headers": camera | FP32}) for x in (other, same, same, same)]
    bodies = [features(answer)[0]["z"] for answer in asyncio.run(client.all(requests))]
    assert len(computed) == 2
    np.testing.assert_array_equal(bodies[1], bodies[3])


def test_a_failure_inside_is_told_without_what_is_inside(shop, camera, caplog):
    def broken(images, digests):
        raise RuntimeError("secret of /home/producer")

    client = shop.client("loop", lanes=Lanes(current=Lane(module=shop.lane("loop").module, infer=broken)))
    response = client.post("/features", content=png(digit_images(1)[0]), headers=camera)
    problem(response, 500, "the server failed")
    assert "secret" not in response.text and "secret" in caplog.text


def test_where_the_books_cannot_be_kept_nothing_is_released(shop, loop, camera, alice, monkeypatch):
    loop.post("/features", content=png(digit_images(1)[0]), headers=camera)

    def full(*args, **kwargs):
        raise sqlite3.OperationalError("disk full: /home/producer/tenants.db")

    monkeypatch.setattr("serve.tenants.gate.book_features", full)
    request = ("POST", "/features", {"content": png(digit_images(1)[0]), "headers": camera})
    responses = [loop.get("/features", headers=alice), *asyncio.run(loop.all([request] * 3))]
    for response in responses:
        problem(response, 503, "written down")
        assert "producer" not in response.text
    monkeypatch.undo()
    assert features(loop.get("/features", headers=alice))[0]["sequence"].tolist() == [1]


def test_a_refusal_of_features_is_one_line_of_the_log(shop, loop, camera, alice):
    shop.registry.set_features("alice", "loop", 0)
    loop.post("/features", content=png(digit_images(1)[0]), headers=camera)
    problem(loop.get("/features", headers=alice), 403, "quota")
    with AuditLog(shop.places.audit) as log:
        assert [line.outcome for line in log.lines(tenant="alice")] == [403]


def test_what_cannot_be_written_down_is_not_told(shop, loop, camera, alice, monkeypatch):
    loop.post("/features", content=png(digit_images(1)[0]), headers=camera)

    def full(*args, **kwargs):
        raise LedgerError("disk full")

    monkeypatch.setattr(AuditLog, "write_all", full)
    for method, path, headers in (("POST", "/features", camera), ("GET", "/features", alice)):
        response = loop.request(method, path, content=png(digit_images(1)[0]), headers=headers)
        assert response.status_code >= 500 and "X-Features" not in response.headers


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_share_of_images_goes_to_the_canary_and_the_same_image_always_the_same_way(shop, camera, alice):
    lanes = Lanes(current=shop.lane("loop"), canary=shop.lane("loop", "2"), share=0.4)
    client = shop.client("loop", lanes=lanes)
    files = [png(image) for image in digit_images(60)]
    first = [client.post("/features", content=file, headers=camera).headers["x-feature-version"] for file in files]
    again = [client.post("/features", content=file, headers=camera).headers["x-feature-version"] for file in files[:9]]
    assert first[:9] == again
    assert set(first) == {lanes.current.version, lanes.canary.version}
    assert 0.2 < first.count(lanes.canary.version) / len(first) < 0.6
    read, text = features(client.get("/features", params={"limit": 64, "version": lanes.canary.version}, headers=alice))
    assert text["version"] == lanes.canary.version
    assert [first[n - 1] for n in read["sequence"] if n <= 60] == [lanes.canary.version] * sum(read["sequence"] <= 60)
    told = client.get("/metadata", headers=alice).json()
    other = client.get("/metadata", params={"version": lanes.canary.version}, headers=alice).json()
    assert (told["version"], told["share"]) == (lanes.current.version, 0.6)
    assert (other["version"], other["share"]) == (lanes.canary.version, 0.4)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_metadata_says_what_is_promised_and_nothing_of_other_tasks(shop, loop, alice):
    told = loop.get("/metadata", headers=alice).json()
    record = shop.catalog.tasks("1")["loop"]
    assert told["guarantee"] == record.guarantee_text and told["feature_shape"] == [64, 4, 4]
    assert told["dtype"] == "float32" and told["epsilon"] is None and told["bits_per_feature"] is None
    assert not any(name in json.dumps(told) for name in ('large"', "parity"))


def test_the_schema_describes_every_route_its_errors_and_its_token(loop, alice):
    schema = loop.get("/openapi.json", headers=alice).json()
    assert {(m.upper(), p) for p, ms in schema["paths"].items() for m in ms} == {
        (method, path) for method, path, _ in ROUTES if path != "/openapi.json"
    }
    for methods in schema["paths"].values():
        for operation in methods.values():
            assert {"401", "404", "429", "503"} <= operation["responses"].keys()
            assert operation["responses"]["404"]["content"]["application/problem+json"]["example"]["status"] == 404
    assert schema["security"] == [{"token": []}]
    publish = schema["paths"]["/features"]["post"]
    assert "image/png" in publish["requestBody"]["content"]
    assert set(publish["responses"]["200"]["content"]) == {media_type(p) for p in PRECISIONS}
    assert "HTTPValidationError" not in json.dumps(schema)
    assert schema_of(loop.app, "/tasks/loop")["servers"] == [{"url": "/tasks/loop"}]
