"""Run as a tenant's process, with what a tenant is given: tries what it should not reach, and prints what it reached.

python tenant_attacks.py '{"url": ..., "token": ..., "ray": "127.0.0.1:6379", "files": [...], "pids": [...]}'
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOBODY = 65534
GIVEN: dict[str, Any] = json.loads(sys.argv[1])


def reached(attempt: Callable[[], Any]) -> str:
    """What it gave; empty if nothing."""
    try:
        found = attempt()
    except BaseException:  # Ray exits in some of its refusals
        return ""
    return repr(found)[:200] if found else ""


def status(method: str, path: str) -> int:
    request = urllib.request.Request(GIVEN["url"] + path, b"x" if method == "POST" else None, method=method)
    request.add_header("Authorization", f"Bearer {GIVEN['token']}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


def joined() -> list[str]:
    import ray

    ray.init(address=GIVEN["ray"], log_to_driver=False, namespace="serve")
    return [str(ray.util.list_named_actors(all_namespaces=True)), str(ray.get_actor("SERVE_CONTROLLER_ACTOR"))]


def gcs() -> list[bytes]:
    from ray._raylet import GcsClient

    client = GcsClient(address=GIVEN["ray"])
    return list(client.internal_kv_keys(b"", namespace=None, timeout=10))


def state() -> list[Any]:
    from ray.util.state import list_actors

    return list(list_actors(address=GIVEN["ray"], timeout=10))


def main() -> None:
    how = GIVEN["how"]
    os.environ["RAY_AUTH_MODE"] = "disabled" if how == "without" else "token"
    if how != "without":
        os.environ["RAY_AUTH_TOKEN"] = {"guessed": "0" * 64, "own": GIVEN["token"], "operator": GIVEN["ray_token"]}[how]
    found: dict[str, Any] = {"gcs": reached(gcs), "state": reached(state), "joined": reached(joined)}
    if os.geteuid() == 0:  # Ray is asked as the producer's own user: there its token alone protects it
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    found["files"] = [path for path in GIVEN["files"] if reached(Path(path).read_bytes)]
    for pid in GIVEN["pids"]:
        for name in ("environ", "mem", "maps"):
            if reached(lambda pid=pid, name=name: os.read(os.open(f"/proc/{pid}/{name}", os.O_RDONLY), 1)):
                found["files"].append(f"/proc/{pid}/{name}")
    found["http"] = {f"{method} {path}": status(method, path) for method, path in GIVEN["paths"]}
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
