"""Features over HTTP: this, against the same model behind bare FastAPI, LitServe and default Ray Serve.

A small published task (16x16 digits), a PNG up and fp16 safetensors down, keep-alive connections, concurrency 1 and 16.
This admits, audits, charges and stores every feature besides; the others only compute it. The bare app behind Serve's
HAProxy is what Serve itself costs in the set-up that this has. Each of them is up beside this one alone, because a
server that is idle takes its share of two cores too, and measured in turns with it, the client on the same cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from _harness import arguments, finish, free_port

ROOT = Path(__file__).parent.parent
TASK = "loop"
SECONDS = 3.0
"""Of each measurement."""
SERVERS = {
    "bare": "FastAPI on uvicorn",
    "haproxy": "bare, Serve, HAProxy",
    "litserve": "LitServe",
    "ray": "Ray Serve, default",
}
TRAIN = [
    *("--preset", "digits", "--image-size", "16", "--split-index", "5", "--head", "linear", "--epochs", "1"),
    *("--engine", "process", "--tasks", TASK, "--epsilon", "None", "--device", "cpu", "--threads", "1"),
]


@dataclass(frozen=True, slots=True)
class Measured:
    p50_ms: float
    p99_ms: float
    per_s: float


def main() -> int:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        environment = {**os.environ, "METAMORPHOSIS_HOME": folder, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command([str(ROOT / "pipelines" / "train.py"), *TRAIN], environment)
        port, token = stack.enter_context(this(home, environment))
        ours = request(port, f"/tasks/{TASK}/features", token)
        found = {}
        for kind in SERVERS:
            with other(kind, home, environment) as theirs:
                found[kind] = measure({"theirs": request(theirs, "/features", ""), "ours": ours}, rounds=options.rounds)
    return report(found, options.json)


def report(found: dict[str, dict[tuple[str, int], list[Measured]]], to: Path | None) -> int:
    """The table, and the three lines that count."""
    for kind, pair in found.items():
        for (whose, at_once), rounds in pair.items():
            p50, p99, per_s = (
                statistics.median(getattr(m, name) for m in rounds) for name in ("p50_ms", "p99_ms", "per_s")
            )
            name = SERVERS[kind] if whose == "theirs" else "  this beside it"
            print(f"{name:20} {at_once:3} at once  p50 {p50:8.2f} ms  p99 {p99:8.2f} ms  {per_s:8.1f} req/s")
    figures = {
        f"{kind} {whose} {n}": [[m.p50_ms, m.p99_ms, m.per_s] for m in rounds]
        for kind, pair in found.items()
        for (whose, n), rounds in pair.items()
    }

    def median(kind: str, at_once: int, of: Callable[[Measured, Measured], float]) -> float:
        pairs = zip(found[kind]["theirs", at_once], found[kind]["ours", at_once], strict=True)
        return statistics.median(of(theirs, ours) for theirs, ours in pairs)

    over = {kind: median(kind, 1, lambda theirs, ours: ours.p50_ms - theirs.p50_ms) for kind in ("bare", "haproxy")}
    print(f"of the next, over the bare app behind Serve and HAProxy (ms at p50) {over['haproxy']:.3f}")
    ok = finish("serve overhead over FastAPI (ms at p50)", over["bare"], 1.0, figures=figures, to=to)
    for kind, target in (("litserve", 1 / 1.5), ("ray", 1 / 5)):
        slower = median(kind, 16, lambda theirs, ours: theirs.per_s / ours.per_s)
        ok &= finish(f"serve throughput of {SERVERS[kind]} over this", slower, target, figures={}, to=None)
    return 0 if ok else 1


def measure(requests: dict[str, tuple[int, bytes]], *, rounds: int) -> dict[tuple[str, int], list[Measured]]:
    """In turns, after a round that is not counted."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for turn in range(rounds + 1):
        for at_once in (1, 16):
            for kind, (port, data) in requests.items():
                one = asyncio.run(load(port, data, at_once=at_once, seconds=SECONDS if turn else 1.0))
                if turn:
                    found.setdefault((kind, at_once), []).append(one)
    return found


async def load(port: int, data: bytes, *, at_once: int, seconds: float) -> Measured:
    """Closed loop: each connection asks again as soon as it is answered."""
    times: list[float] = []
    ends = time.perf_counter() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.perf_counter()) < ends:
            writer.write(data)
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial or not times:  # it does not answer yet
                    raise
                print(f"port {port} closed a connection between two requests", flush=True)  # as HAProxy may
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            assert head.split(b" ", 2)[1] == b"200", head
            (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            times.append(time.perf_counter() - started)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(at_once)))
    took = time.perf_counter() - began
    times.sort()
    return Measured(1000 * times[len(times) // 2], 1000 * times[int(0.99 * len(times))], len(times) / took)


def request(port: int, path: str, token: str) -> tuple[int, bytes]:
    """(port, the bytes of a request)."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(buffer, "PNG")
    body = buffer.getvalue()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n"
    return port, (head + (f"Authorization: Bearer {token}\r\n" if token else "") + "\r\n").encode() + body


@contextlib.contextmanager
def other(kind: str, home: Path, environment: dict[str, str]) -> Iterator[int]:
    """The port of a server that is not this."""
    port = free_port()
    if kind == "haproxy":
        environment = behind_haproxy(home / "haproxy", environment)
    running = subprocess.Popen(  # noqa: S603
        [sys.executable, str(Path(__file__).with_name("_servers.py")), kind, str(port), str(home)],
        env=environment,
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(kind, *request(port, "/features", ""))
        yield port
    finally:
        running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)  # what it has left behind


def behind_haproxy(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """What makes Serve run HAProxy, as `deploy.py up` has it, but for the routes that are hidden there."""
    from serve.deployment.environment import Entrance, serve_environment, write_haproxy_script

    write_haproxy_script(folder)
    chosen = serve_environment(Entrance(haproxy=True), folder)
    del chosen["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    return on_ports_of_its_own({**environment, **chosen})


def on_ports_of_its_own(environment: dict[str, str]) -> dict[str, str]:
    """For what HAProxy says of itself."""
    names = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
    return {**environment, **{name: str(free_port()) for name in names}}


@contextlib.contextmanager
def this(home: Path, environment: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(port, token of a device)."""
    from serve.tenants.gate import Places
    from serve.tenants.registry import Registry

    port = free_port()
    environment = on_ports_of_its_own({n: value for n, value in environment.items() if not n.startswith("RAY_")})
    deploy = str(ROOT / "pipelines" / "deploy.py")
    with Registry(Places.in_storage(home).registry) as registry:
        token = registry.add("camera", "device").token.text
        registry.grant("camera", TASK)
    try:
        command([deploy, "up", TASK, "--port", str(port), "--metrics-port", str(free_port())], environment)
        wait_for("this", *request(port, f"/tasks/{TASK}/features", token))
        yield port, token
    finally:
        command([deploy, "down", "--all"], environment)


def wait_for(kind: str, port: int, data: bytes) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            asyncio.run(load(port, data, at_once=1, seconds=0.1))
            return
        except (OSError, AssertionError, asyncio.IncompleteReadError):
            if time.monotonic() > deadline:
                raise SystemExit(f"{kind} did not answer at port {port} within 180 s") from None
            time.sleep(0.5)


def command(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    raise SystemExit(main())
