#!/usr/bin/env python3
"""What the gate costs a request: token, grant, rate and quotas checked and features booked, beside one bare read of the
same row from the same SQLite file, with 100 tenants of 20 tasks in it.

    admit           read the registry, compare the token, take a request of the minute's
    admit + charge  and book the feature: what a release of a plain feature costs
    with bits       and charge a bounded feature whose bits were charged before: what a keyed release costs
"""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _harness import arguments, finish

from orchestrator.privacy.bounded.bit_ledger import BitLedger
from serve.tenants import registry as registry_module
from serve.tenants.gate import Gate, Places
from serve.tenants.registry import Registry

TENANTS, TASKS, REPEAT = 100, 20, 300
BITS, DIGEST = 9.3, [bytes(16)]
TARGET = 10.0
"""Times a bare read, for admit + charge: five statements in two transactions, and a file of rates."""


def filled(path: Path) -> str:
    """The header of one of many tenants."""
    with Registry(path) as registry:
        for number in range(TENANTS):
            issued = registry.add(f"tenant{number}", "tenant", requests_per_minute=10**9)
            for task in range(TASKS):
                registry.grant(f"tenant{number}", f"task{task}")
                registry.set_features(f"tenant{number}", f"task{task}", 10**12)
    return f"Bearer {issued.token.text}"


def each(work: Callable[[], object]) -> list[float]:
    """Microseconds of every call."""
    times = []
    for _ in range(REPEAT):
        started = time.perf_counter_ns()
        work()
        times.append((time.perf_counter_ns() - started) / 1e3)
    return times


def percentile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100)[percent - 1]


def main() -> int:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.db"
        authorization = filled(path)
        with BitLedger(Places(registry=path).bits) as ledger:
            ledger.set_limit(f"tenant{TENANTS - 1}", "task1", 1e9)
        gate = Gate(path)
        plain = sqlite3.connect(path, isolation_level=None)
        token = authorization.split("_")[1]

        def bare() -> None:
            plain.execute(registry_module._STANDING, ("task0", "read", "task0", token)).fetchone()

        def admit() -> None:
            gate.admit(authorization, task="task0", verb="read", features=1)

        def charge() -> None:
            gate.admit(authorization, task="task0", verb="read", features=1).charge([], "1", None, False, 1)

        def bounded() -> None:
            gate.admit(authorization, task="task1", verb="read", features=1).charge(DIGEST, "1", BITS, False, 1)

        works = {"a bare read": bare, "admit": admit, "admit + charge": charge, "with bits": bounded}
        for work in works.values():
            each(work)
        rounds = [{name: each(work) for name, work in works.items()} for _ in range(options.rounds)]
        gate.close()
        plain.close()
    figures = {}
    for name in works:
        times = [value for one in rounds for value in one[name]]
        figures[name] = {"p50_us": percentile(times, 50), "p99_us": percentile(times, 99)}
        figures[name]["per_second"] = 1e6 / statistics.mean(times)
        print(
            f"{name:15} p50 {figures[name]['p50_us']:7.1f} us  p99 {figures[name]['p99_us']:7.1f} us  "
            f"{figures[name]['per_second']:9.0f} a second"
        )
    medians = [statistics.median(one["admit + charge"]) / statistics.median(one["a bare read"]) for one in rounds]
    return 0 if finish("gate", statistics.median(medians), TARGET, figures=figures, to=options.json) else 1


if __name__ == "__main__":
    raise SystemExit(main())
