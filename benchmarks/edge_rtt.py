#!/usr/bin/env python3
"""A training step's round trip to a tenant's process over HTTP: features down, gradient up (the paper's Table 9).

ResNet-18 cut at k = 5, 7, 9, its remainder as the tenant's head, one core on each side, one image (as in the paper) and
64; over loopback, and from a network namespace behind 50 Mbit/s and 5 ms each way. Medians; beside each is the least
that it could be: the head's fastest step in this process, and the bytes of both bodies at the link's rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _harness import arguments, finish, free_port, session_plan

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from namespaces import Namespace, NoNamespaceError, shaped_namespace

CUTS, PRECISIONS, SIZES = (5, 7, 9), ("fp32", "fp16", "int8"), (1, 64)
MBIT, DELAY_MS = 50.0, 5.0
WARM_UP = 2
TASK = "task0"
TARGET = 1.5
"""Times the least, for 64 images over the shaped link, the worst row."""
TENANT = """
import sys
from serve.edge.train import main
token, folder, *jobs = sys.argv[1:]
for url, precision in zip(jobs[::2], jobs[1::2]):
    main(["--url", url, "--plain-http", "--precision", precision, "--task", "task0", "--token-file", token,
          "--key-file", folder + "/key", "--state", folder + "/states", "--out", folder + "/heads",
          "--device", "cpu", "--threads", "1", "--patience-s", "120"])
"""


def main() -> int:
    options = arguments(__doc__ or "")
    import torch

    torch.set_num_threads(1)
    print("k  images  network    precision  head MiB  down KiB    up KiB  step ms   least ms")
    with tempfile.TemporaryDirectory() as folder:
        plans = {k: session_plan(1, Path(folder) / f"k{k}", split_index=k) for k in CUTS}
        rows = over("loopback", None, plans, options.rounds, Path(folder))
        try:
            with shaped_namespace(mbit=MBIT, delay_ms=DELAY_MS) as namespace:
                if namespace.carrier == "process":
                    print(f"no netem in this kernel: a process holds packets to {MBIT:g} Mbit/s and {DELAY_MS:g} ms")
                rows += over("shaped", namespace, plans, options.rounds, Path(folder))
        except NoNamespaceError as error:
            print(f"no network namespace, so loopback alone was measured ({error})")
    worst = [row["step_ms"] / row["least_ms"] for row in rows if row["network"] == "shaped" and row["images"] > 1]
    if not worst:
        return 1
    return 0 if finish("edge_rtt", max(worst), TARGET, figures={"rows": rows}, to=options.json) else 1


def over(
    network: str, namespace: Namespace | None, plans: dict[int, Any], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Every row of one network."""
    host = "127.0.0.1" if namespace is None else namespace.host
    jobs = [(k, precision, free_port(host)) for k, precision in itertools.product(CUTS, PRECISIONS)]
    rows = []
    with tenant(namespace, [(f"http://{host}:{port}", p) for _, p, port in jobs], folder / network) as token_gate:
        for k, precision, port in jobs:
            for row in measured(plans[k], precision, host, port, token_gate, rounds):
                wire_s = 0.0
                if namespace is not None:
                    wire_s = 8 * (row["down_bytes"] + row["up_bytes"]) / (namespace.mbit * 1e6)
                    wire_s += 2 * namespace.delay_ms / 1e3
                row |= {"k": k, "network": network, "precision": precision}
                row["least_ms"] = row["head_ms"] + 1e3 * wire_s
                rows.append(row)
                print(
                    f"{k}  {row['images']:6}  {network:9}  {precision:9}  {row['head_bytes'] / 2**20:8.2f}  "
                    f"{row['down_bytes'] / 2**10:8.1f}  {row['up_bytes'] / 2**10:8.1f}  {row['step_ms']:7.1f}  "
                    f"{row['least_ms']:9.1f}",
                    flush=True,
                )
    return rows


@contextmanager
def tenant(namespace: Namespace | None, jobs: list[tuple[str, str]], folder: Path) -> Iterator[Any]:
    """A gate, and a process that trains one job after the other behind it."""
    from serve.tenants.gate import Gate
    from serve.tenants.registry import Registry

    folder.mkdir()
    with Registry(folder / "registry.db") as registry:
        token = registry.add("acme", role="tenant").token.text
        registry.grant("acme", TASK)
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    argv = [sys.executable, "-c", TENANT, str(folder / "token"), str(folder), *itertools.chain(*jobs)]
    gate = Gate(folder / "registry.db")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - ourselves
            argv if namespace is None else namespace.command(argv),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        yield gate
    except Exception:
        print((folder / "log").read_text(), file=sys.stderr)
        raise
    finally:
        process.kill()
        process.wait()
        gate.close()


def measured(plan: Any, precision: Any, host: str, port: int, gate: Any, rounds: int) -> list[dict[str, Any]]:
    """Steps of both batch sizes in one training, and the same steps of a head in this process."""
    from orchestrator.local import LocalConsumer, LocalProducer
    from orchestrator.ports import Ready
    from orchestrator.session import Session
    from serve.remote.listener import Endpoint, Listener

    producer, config = LocalProducer(plan), plan.consumer_config(TASK)
    offer = producer.offers()[TASK]
    whole = producer.features(0)[TASK].result()
    with Listener((TASK,), Endpoint(host=host, port=port), gate, patience_s=60.0) as listener:
        remote = listener.consumer(offer, config, run=f"{host}-{port}")
        local = LocalConsumer(offer, config, device="cpu")
        for consumer in (remote, local):
            Session(producer, [consumer], steps_per_epoch=1, epochs=1).enrol(["train"])
        rows, steps = [], itertools.count()
        for images in SIZES:
            batch = dataclasses.replace(whole, example_ids=whole.example_ids[:images], features=whole.features[:images])
            times = []
            for _ in range(WARM_UP + 3 * rounds):
                step = dataclasses.replace(batch, step=next(steps))
                times.append(tuple(timed(consumer, Ready(step)) for consumer in (remote, local)))
            theirs, ours = zip(*times[WARM_UP:], strict=True)
            gradient = remote.learn(Ready(dataclasses.replace(batch, step=next(steps)))).result()
            local.learn(Ready(dataclasses.replace(batch, step=gradient.step)))
            down, up = body_bytes(batch, gradient, precision)
            rows.append(
                {
                    "images": images,
                    "step_ms": 1e3 * statistics.median(theirs),
                    "head_ms": 1e3 * min(ours),
                    "down_bytes": down,
                    "up_bytes": up,
                    "head_bytes": sum(v.nbytes for v in local.consumer.head().state.values()),
                }
            )
        listener.tell({TASK: {"version": None, "reason": "it was a benchmark"}})
    return rows


def timed(consumer: Any, batch: Any) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    consumer.learn(batch).result()
    return time.perf_counter() - started


def body_bytes(batch: Any, gradient: Any, precision: Any) -> tuple[int, int]:
    """Of the bodies of a step, as they travel."""
    from serve.codec import compress
    from serve.remote.messages import Reply, Work, batch_arrays, batch_fields, gradient_reply

    work = Work(sitting="0" * 16, number=1, kind="learn", fields=batch_fields(batch), arrays=batch_arrays(batch))
    fields, arrays = gradient_reply(gradient, precision)
    reply = Reply(process="0" * 16, sitting="0" * 16, number=1, precision=precision, fields=fields, arrays=arrays)
    return len(compress(work.to_bytes(precision), "zstd")), len(compress(reply.to_bytes(), "zstd"))


if __name__ == "__main__":
    raise SystemExit(main())
