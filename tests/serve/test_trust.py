"""A running Serve, attacked by a tenant who has everything that a tenant is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from access_matrix import WHO, cells, expected, register
from http_server import RawConnection
from served import Shop, digit_images, png

from serve.deployment.head import HeadFile
from serve.tenants.gate import Places
from serve.tenants.registry import Registry

ATTACKS = Path(__file__).with_name("tenant_attacks.py")
IMAGE = png(digit_images(1)[0])
ROUTES = {
    "publish": ("POST", "features"),
    "read": ("GET", "features/latest"),
    "metadata": ("GET", "metadata"),
    "train": ("POST", "training"),
    "operate": ("GET", "operate"),
}
FOREIGN = [
    *(
        ("GET", f"/tasks/large/{path}")
        for path in ("features", "features/latest", "stream", "metadata", "openapi.json")
    ),
    *(("POST", "/tasks/large/features"), ("POST", "/tasks/loop/features"), ("GET", "/tasks/parity/features")),
    *(("GET", f"/tasks/loop/{path}") for path in ("images", "images/latest", "labels", "key", "keys", "head")),
    *(("GET", path) for path in ("/-/routes", "/api/serve/applications/", "/api/actors", "/metrics", "/api/jobs/")),
]


def attacked(given: dict, tmp_path: Path, how: str) -> dict:
    """What a process reaches in an environment with nothing in it; files and memory as another user."""
    home = tmp_path / f"tenant-{how}"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, str(ATTACKS), json.dumps({**given, "how": how})],
        env={
            "HOME": str(home),
            "TMPDIR": str(home),
            "PATH": os.environ["PATH"],
            "RAY_gcs_rpc_server_connect_timeout_s": "5",
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tenants_process_reaches_its_own_features_and_nothing_else(operator, tmp_path):
    flags = ("--encoder-version", "1", "--port", str(operator.port), "--metrics-port", str(operator.metrics_port))
    operator.deploy("up", "loop,large", *flags)
    with Shop(operator.home, operator.home) as shop:
        versions = {task: shop.model(task).module.card.version for task in NAMED.values()}
        token = shop.token("mallory", "tenant", loop=["read", "metadata"])["Authorization"].removeprefix("Bearer ")
    check_access(operator, versions)
    head = HeadFile(operator.home / "serving")
    secrets = [head.token, *(operator.home / "keys").rglob("*")]
    for folder in [*tmp_path.parents, tmp_path, operator.home, *(p for p in operator.home.rglob("*") if p.is_dir())]:
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith(str(tmp_path.parents[1])):
            folder.chmod(0o755)  # so that each secret is kept by its own mode
    given = {
        "url": operator.url,
        "token": token,
        "ray": head.read().address,
        "ray_token": "",
        "files": [str(path) for path in secrets if path.is_file()] if os.geteuid() == 0 else [],
        "pids": sorted(operator.replicas("loop")) if os.geteuid() == 0 else [],
        "paths": [*FOREIGN, ("GET", "/tasks/loop/metadata")],
    }
    for how in ("without", "guessed", "own"):
        found = attacked(given, tmp_path, how)
        http = found.pop("http")
        assert found == {"gcs": "", "state": "", "joined": "", "files": []}, how
        assert http.pop("GET /tasks/loop/metadata") == 200
        assert set(http.values()) == {404}, http
    with_the_operators = attacked({**given, "ray_token": head.token.read_text().strip()}, tmp_path, "operator")
    assert with_the_operators["gcs"] and with_the_operators["joined"], "the attempts would reach Ray if they might"


NAMED = {"smile": "loop", "glasses": "large"}
"""Tasks of the matrix, and those that are served in their place."""


def check_access(operator, served: dict[str, str]) -> None:
    """A part of the matrix, through HAProxy and Serve."""
    with Registry(Places.in_storage(operator.home).registry) as registry:
        header = register(registry)
        for who, (_, grants) in WHO.items():
            for task in grants.keys() & NAMED.keys():
                registry.grant(who, NAMED[task], sorted(grants[task]))
    wrong, outcomes = [], Counter()
    with RawConnection(*place(operator)) as connection:
        for cell in (cell for cell in cells() if cell.task in {*NAMED, "absent", "SMILE"} and cell.version != "99"):
            value = header(cell)
            if value is not None and value != value.strip():
                continue
            task = NAMED.get(cell.task, cell.task)
            method, route = ROUTES[cell.verb]
            version = served.get(task, "1") if cell.version == "1" else cell.version
            query = f"?version={version}" if method == "GET" else ""
            headers = [] if value is None else [("Authorization", value)]
            answer = connection.ask(
                method, f"/tasks/{task}/{route}{query}", headers, IMAGE if method == "POST" else b""
            )
            right = expected(cell, tasks=NAMED, versions={"latest", "1"} if method == "GET" else None)
            if cell.verb in {"train", "operate"} and right != 401:
                right = 404
            status = 200 if answer.status == 204 else answer.status
            refused_by_http = cell.credential == "malformed" and status == 400
            if status != right and not refused_by_http:
                wrong.append((cell, answer, right))
            outcomes[status] += 1
    assert not wrong, wrong[:5]
    assert outcomes.total() > 2000 and outcomes[200] > 20, outcomes


def place(operator) -> tuple[str, int]:
    parts = urlsplit(operator.url)
    return parts.hostname, parts.port
