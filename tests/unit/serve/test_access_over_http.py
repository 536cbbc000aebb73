"""The whole access matrix over HTTP, and what an attacker does to requests of others: ids, replays, two tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from urllib.parse import quote

import numpy as np
import pytest
from access_matrix import Cell, cells, expected, register
from http_server import RawConnection, RawResponse, on_uvicorn
from served import png
from small_service import SmallServices

from serve.codec import decode, media_type
from serve.tenants.registry import Registry

TASKS = ("smile", "glasses", "pose", "hidden")
"""Of the names in the matrix, those that are served."""
VERSIONS = ("latest", "1", "2")
ROUTES = {
    "publish": [("POST", "features")],
    "read": [("GET", "features"), ("GET", "features/latest"), ("GET", "stream")],
    "metadata": [("GET", "metadata"), ("GET", "healthz"), ("GET", "openapi.json")],
    "train": [("POST", "training")],
    "operate": [("GET", ""), ("GET", "operate"), ("POST", "operate")],
}
"""Below a task. The last two verbs have no route of a task's endpoint: nobody gets anything there."""
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
IMAGE = png(IMAGES[0])
ROOM = {"max_bytes": 1 << 20, "max_values": 1 << 18}
FP32 = ("Accept", media_type("fp32"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, services, header of a cell, the registry's file): every task has a feature of every version."""
    path = tmp_path_factory.mktemp("access") / "tenants.db"
    with Registry(path) as registry:
        header = register(registry)
    limits = dataclasses.replace(SmallServices.LIMITS, stream_s=0.05)
    with SmallServices(path, TASKS, limits=limits) as services, on_uvicorn(services.app()) as address:
        for task, version in itertools.product(TASKS, "12"):
            services.publish(task, version, IMAGES)
        yield address, services, header, path


def what_http_leaves_of(cell: Cell, header: str | None) -> Cell:
    """HTTP takes blanks off both ends of a header: some malformed ones are well-formed when they arrive."""
    if cell.credential == "malformed" and header is not None and header != header.strip() and len(header.split()) == 2:
        return dataclasses.replace(cell, credential="valid")
    return cell


def right_answer(cell: Cell) -> int:
    if cell.verb in {"train", "operate"}:
        return 401 if expected(cell) == 401 else 404
    has_version = cell.verb == "read"
    return expected(cell, tasks=TASKS, versions=VERSIONS if has_version or cell.verb == "metadata" else None)


def request_of(cell: Cell, number: int, header: str | None) -> tuple[str, str, list[tuple[str, str]], bytes]:
    routes = ROUTES[cell.verb]
    method, route = routes[number % len(routes)]
    if cell.verb == "metadata" and cell.version not in {"latest", *VERSIONS}:
        route = "metadata"  # the other two have no version
    task = quote(cell.task, safe="", errors="surrogateescape")
    query = f"?version={cell.version}" if cell.verb in {"read", "metadata"} else ""
    headers = [FP32] if header is None else [FP32, ("Authorization", header)]
    return method, f"/tasks/{task}/{route}{query}", headers, IMAGE if method == "POST" else b""


def check_content(cell: Cell, response: RawResponse, wanted: dict[tuple[str, str], np.ndarray]) -> None:
    """A body of features is of the task that was asked for, and nothing but the model's answer."""
    if response.headers.get("content-type", "").startswith("application/x-safetensors;"):
        arrays, text = decode(response.body, **ROOM)
        assert text["task"] == cell.task
        assert cell.version in {"latest", text["version"]} or cell.verb == "publish"
        z = wanted[cell.task, text["version"]]
        distance = np.abs(arrays["z"][:, None] - z[None]).max(axis=(2, 3, 4)).min(axis=1)
        assert distance.max() < 1e-4, "as float32 has it for a batch of another size"


def test_the_whole_matrix_over_http(served):
    (host, port), services, header, _ = served
    wanted = {key: model.features(IMAGES) for key, model in services.models.items()}
    wrong, outcomes, bodies = [], Counter(), {401: set(), 404: set()}
    with RawConnection(host, port) as connection:
        for number, one in enumerate(cells()):
            given = header(one)
            cell = what_http_leaves_of(one, given)
            response = connection.ask(*request_of(cell, number, given))
            if "\n" in (given or ""):
                connection.close()  # what came after the line break was another request
            right = right_answer(cell)
            status = 200 if response.status in {200, 204} else response.status
            if given is not None and not given.isprintable() and status == 400:
                status = right = 401  # HTTP itself refuses the header: nothing of ours has seen it
            elif right in bodies:
                bodies[right].add(response.body)
            if status != right:
                wrong.append((cell, status, right))
            elif status == 200:
                check_content(cell, response, wanted)
            outcomes[status] += 1
    assert not wrong, (len(wrong), wrong[:5])
    assert outcomes.total() == 15_680 and outcomes[200] == 67
    assert {status: len(told) for status, told in bodies.items()} == {401: 1, 404: 1}


def token_of(path, name, **grants) -> tuple[str, str]:
    """(header, value) of somebody new, or of the same one anew."""
    with Registry(path) as registry:
        known = {tenant.name for tenant in registry.tenants()}
        issued = registry.rotate(name) if name in known else registry.add(name, "tenant")
        for task, verbs in grants.items():
            registry.grant(name, task, verbs)
    return "Authorization", f"Bearer {issued.token.text}"


@pytest.fixture
def connection(served):
    (host, port), *_ = served
    with RawConnection(host, port) as opened:
        yield opened


def test_a_recorded_request_with_a_token_that_was_rotated_is_worth_nothing(served, connection):
    path = served[3]
    old = token_of(path, "erin", smile=["read", "metadata"])
    recorded = [("GET", f"/tasks/smile/{route}", [old]) for verb in ("read", "metadata") for _, route in ROUTES[verb]]
    assert {connection.ask(*request).status for request in recorded} == {200, 204}
    new = token_of(path, "erin")
    nobody = connection.ask("GET", "/tasks/smile/features")
    for request in recorded:
        replayed = connection.ask(*request)
        assert (replayed.status, replayed.body) == (nobody.status, nobody.body) == (401, nobody.body), request
    assert connection.ask("GET", "/tasks/smile/features", [new]).status == 200


def test_a_recorded_request_is_worth_nothing_in_another_task(served, connection):
    header = token_of(served[3], "frank", smile=["read", "metadata"])
    unknown = connection.ask("GET", "/tasks/absent/features", [header])
    for task in ("glasses", "pose", "hidden"):
        for verb in ("publish", "read", "metadata", "train"):
            for method, route in ROUTES[verb]:
                response = connection.ask(
                    method, f"/tasks/{task}/{route}", [header], IMAGE if method == "POST" else b""
                )
                assert (response.status, response.body) == (404, unknown.body), (task, method, route)


FOREIGN = "/tasks/glasses/features"
TAMPERED = [
    *("/tasks/smile/../glasses/features", "/tasks/smile/..%2fglasses/features", "/tasks/smile/%2e%2e/glasses/features"),
    *("//tasks/glasses/features", "/tasks//glasses/features", "/tasks/glasses//features", "/./tasks/glasses/features"),
    *("/tasks/glasses%00/features", "/tasks/smile;glasses/features", "/tasks/smile%2f..%2fglasses/features"),
    *("/tasks/smile/features/../../glasses/features", "/tasks/glasses/features?task=smile", "/TASKS/glasses/features"),
    *("http://task/tasks/glasses/features", "http://task/tasks/smile/../glasses/features", "/tasks/glasses/features#"),
    *("/tasks/gl%61sses/features", "/tasks/%67lasses/features/latest", "/tasks/glasses/features%3fafter=0"),
]


@pytest.mark.parametrize("target", TAMPERED)
def test_no_spelling_of_a_path_reaches_another_task(served, connection, target):
    header = token_of(served[3], "grace", smile=["read", "metadata"])
    response = connection.ask("GET", target, [header])
    assert response.status in {400, 404}, response
    if response.status == 404:
        assert json.loads(response.body)["title"] == "there is no such task for this token"


OVERRIDES = [
    *("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Path", "X-Forwarded-Prefix", "X-Forwarded-Uri", "X-Script-Name"),
]


def test_no_header_reaches_another_task_or_another_verb(served, connection):
    header = token_of(served[3], "heidi", smile=["read"])
    mine = decode(connection.ask("GET", "/tasks/smile/features", [header]).body, **ROOM)[1]
    assert mine["task"] == "smile"
    for name in OVERRIDES:
        for value in (FOREIGN, "/tasks/glasses"):
            response = connection.ask("GET", "/tasks/smile/features", [header, (name, value)])
            assert decode(response.body, **ROOM)[1] == mine
            assert connection.ask("GET", FOREIGN, [header, (name, "/tasks/smile/features")]).status == 404
    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        response = connection.ask("GET", "/tasks/smile/features", [header, (name, "POST")], IMAGE)
        assert decode(response.body, **ROOM)[1] == mine
    for name in ("X-Forwarded-User", "X-Remote-User", "X-Tenant", "X-Forwarded-For", "Cookie", "Proxy-Authorization"):
        assert connection.ask("GET", FOREIGN, [header, (name, "bob")]).status == 404
        assert connection.ask("GET", FOREIGN, [(name, header[1])]).status == 401


def test_of_two_tokens_in_one_request_one_counts_and_they_are_never_joined(served, connection):
    path = served[3]
    mine, theirs = token_of(path, "ivan", smile=["read"]), token_of(path, "judy", glasses=["read"])
    for first, second in ((mine, theirs), (theirs, mine)):
        open_to = {
            task: connection.ask("GET", f"/tasks/{task}/features", [first, second]).status
            for task in ("smile", "glasses")
        }
        assert sorted(open_to.values()) in ([200, 404], [401, 401]), open_to


def test_a_token_in_the_address_or_the_body_is_none(served, connection):
    _, value = token_of(served[3], "kim", smile=["read"])
    token = value.removeprefix("Bearer ")
    for target in (f"/tasks/smile/features?access_token={token}", f"http://kim:{token}@task/tasks/smile/features"):
        assert connection.ask("GET", target).status in {400, 401}
    assert connection.ask("POST", "/tasks/smile/features", body=f"access_token={token}".encode()).status == 401


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE"])
def test_no_request_tells_a_stranger_whether_a_task_is_served(served, connection, method):
    eve = token_of(served[3], "eve", pose=["metadata"])
    suffixes = [route for routes in ROUTES.values() for _, route in routes]
    suffixes += [f"{suffix}/" for suffix in suffixes] + [f"{suffix}?after=x" for suffix in suffixes] + ["docs", "//"]
    for suffix, headers in itertools.product(suffixes, ([], [eve])):
        there, nowhere = (connection.ask(method, f"/tasks/{task}/{suffix}", headers) for task in ("smile", "absent"))
        assert there.status == (404 if headers else 401), (suffix, there)
        for response in (there, nowhere):
            response.headers.pop("date")
        assert there == nowhere, (suffix, there, nowhere)


MALFORMED = [
    b"GET /tasks/smile/features HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    b"POST /tasks/smile/features HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /tasks/smile/features HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /tasks/smile/features HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
    b"POST /tasks/smile/features HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    b"GET /tasks/smile/features HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /tasks/smile/features HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET  /tasks/smile/features\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\0" * 5000,
]


@pytest.mark.parametrize("data", MALFORMED)
def test_what_is_no_http_is_refused_and_the_next_client_is_answered(served, data):
    (host, port), _, _, path = served
    with RawConnection(host, port, timeout_s=1.0) as broken:
        response = broken.send(data)
    assert response is None or response.status in {400, 401, 404, 431}, response
    assert response is None or b"Traceback" not in response.body
    header = token_of(path, "lena", smile=["metadata"])
    with RawConnection(host, port) as connection:
        assert connection.ask("GET", "/tasks/smile/metadata", [header]).status == 200


def test_senders_who_never_finish_do_not_keep_others_waiting(served):
    (host, port), _, _, path = served
    header = token_of(path, "mona", smile=["metadata"])
    slow = [RawConnection(host, port, timeout_s=0.01) for _ in range(100)]
    try:
        for number, sender in enumerate(slow):
            body = b"POST /tasks/smile/features HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"
            sender.send(body if number % 2 else b"GET /tasks/smile/metadata HTTP/1.1\r\nHost: ", keep=True)
        with RawConnection(host, port, timeout_s=10) as connection:
            for _ in range(20):
                assert connection.ask("GET", "/tasks/smile/metadata", [header]).status == 200
    finally:
        for sender in slow:
            sender.close()
