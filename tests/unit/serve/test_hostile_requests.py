"""Thousands of requests that mean harm, of tenants, devices and nobody: nothing breaks, tells, or grows."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import os
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import schemathesis
from hostile_requests import Attack, Target, answered, attacks, check
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import png
from small_service import SmallServices

from serve.api import build_api, schema_of
from serve.codec import decode, media_type
from serve.streams import RingLimits
from serve.tenants.registry import Registry

IMAGES = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
ROUTES = (
    b"features",
    b"features",
    b"features",
    b"features/latest",
    b"stream",
    b"metadata",
    b"healthz",
    b"openapi.json",
)
PATHS = [
    *(b"/tasks/" + task + b"/" + route for task in (b"smile", b"smile", b"pose", b"absent") for route in ROUTES),
    *(b"/", b"/tasks", b"/-/routes", b"/-/healthz", b"/metrics", b"/docs", b"/openapi.json", b"/tasks/smile"),
]
LIMITS = dataclasses.replace(
    SmallServices.LIMITS, max_body_bytes=1 << 20, body_s=0.3, stream_s=0.02, max_wait_s=0.02, max_inflight=8
)
SLOW_S = 0.4
AT_ONCE = 8
GROWTH_BYTES = 48 << 20
"""Of the process after its caches are warm, however many requests there were."""


@pytest.fixture
def served(tmp_path):
    """(services, the app, headers of a device and of a tenant)."""
    path = tmp_path / "tenants.db"
    with Registry(path) as registry:
        camera, alice = (registry.add("camera", "device"), registry.add("alice", "tenant"))
        registry.grant("camera", "smile", ["publish"])
        registry.grant("alice", "smile", ["read", "metadata"])
        registry.grant("alice", "pose", ["metadata"])
    tokens = [f"Bearer {issued.token.text}".encode() for issued in (camera, alice)]
    with SmallServices(path, ("smile", "pose"), limits=LIMITS, ring=RingLimits(max_features=500)) as services:
        yield services, services.app(), tokens


def rss() -> int:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss


async def attacked(app, given, *, seconds: float | None = None, number: int | None = None) -> Counter[int]:
    """Statuses. `AT_ONCE` requests are under way together; ends after so many, or so long."""
    statuses = Counter[int]()
    ends = None if seconds is None else time.monotonic() + seconds

    async def some() -> None:
        for attack in given:
            answer = await answered(app, attack)
            check(attack, answer)
            statuses[int(answer.status)] += 1
            if (ends is not None and time.monotonic() > ends) or (number is not None and statuses.total() >= number):
                return

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return statuses


async def right_answers(app, services, tokens) -> None:
    """Whoever means no harm gets what the model gives."""
    for image in IMAGES:
        headers = ((b"authorization", tokens[0]), (b"accept", media_type("fp32").encode()))
        answer = await answered(app, Attack("good", "POST", b"/tasks/smile/features", b"", headers, (png(image),)))
        assert answer.status == 200, bytes(answer.body)
        arrays, text = decode(bytes(answer.body), max_bytes=1 << 20, max_values=1 << 18)
        wanted = services.models["smile", text["version"]].features(image[None])
        np.testing.assert_allclose(arrays["z"], wanted, atol=1e-5)


def target(tokens) -> Target:
    device, tenant = tokens
    return Target(
        open=[
            *[("POST", b"/tasks/smile/features", device)] * 6,
            *(("GET", b"/tasks/smile/" + route, tenant) for route in ROUTES),
        ],
        paths=PATHS,
        tokens=[*tokens * 3, b"", b"Bearer", b"Bearer mm_0_0", b"Basic YTpi", b"Bearer " + b"A" * 9000, b"\xff\xfe"],
        good=png(IMAGES[0]),
        slow_s=SLOW_S,
    )


def run_hostile(served, *, number: int, warm: int) -> Counter[int]:
    services, app, tokens = served

    async def all_of_it() -> tuple[Counter[int], int]:
        given = attacks(target(tokens), seed=0)
        first = await attacked(app, given, number=warm)
        before = rss()
        then = await attacked(app, given, number=number - warm)
        grown = rss() - before
        await right_answers(app, services, tokens)
        return first + then, grown

    statuses, grown = asyncio.run(all_of_it())
    sys.stdout.write(
        f"{statuses.total()} hostile requests: {dict(sorted(statuses.items()))}; {grown / 2**20:+.1f} MiB\n"
    )
    assert grown < GROWTH_BYTES, f"{grown / 2**20:.0f} MiB more after {number} requests"
    return statuses


def test_hostile_requests_break_nothing_tell_nothing_and_leave_nothing_behind(served):
    statuses = run_hostile(served, number=4000, warm=1500)
    assert {200, 204, 400, 401, 404, 405, 406, 408, 413, 415} <= statuses.keys(), "the attacks reach every check"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_hostile_requests(served):
    assert run_hostile(served, number=100_000, warm=5000).total() >= 100_000


def test_every_kind_of_body_is_refused_or_is_an_image(served):
    """Each kind from a device that may publish, so that the decoders see it."""
    _, app, tokens = served
    headers = ((b"authorization", tokens[0]),)

    async def every() -> dict[str, set[int]]:
        seen: dict[str, set[int]] = {}
        for attack in itertools.islice(attacks(target(tokens), seed=7), 1500):
            plain = Attack(attack.name, "POST", b"/tasks/smile/features", b"", headers, attack.chunks)
            answer = await answered(app, plain)
            check(plain, answer)
            seen.setdefault(attack.name, set()).add(int(answer.status))
        return seen

    seen = asyncio.run(every())
    assert set().union(*seen.values()) <= {200, 413, 415}
    for name in ("noise", "pickled", "array", "tensors", "bmp_bomb", "zstd_bomb", "deflate_bomb", "nested"):
        assert 200 not in seen[name], name
    assert 200 in seen["animation"] and 200 in seen["bent"]


OPERATIONS = [("POST", "/features"), *(("GET", f"/{path}") for path in ("features", "features/latest", "stream"))]
OPERATIONS += [("GET", "/metadata"), ("GET", "/healthz")]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_schema_allows_and_what_it_forbids_is_answered_as_it_says(served, method, path):
    services, _, tokens = served
    app = build_api(services.services["smile"])
    schema = schemathesis.openapi.from_dict(schema_of(app, ""))
    schema.app = app
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    ]
    tried, token = 0, tokens[0] if method == "POST" else tokens[1]
    for mode in GenerationMode:

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        def conforms(case):
            nonlocal tried
            tried += 1
            case.validate_response(case.call(headers={"Authorization": token.decode()}), checks=checks)

        conforms()
    assert tried >= 2
