#!/usr/bin/env python3
"""A served task at 80 % of what it can do, one replica killed each minute: no answer is wrong, and none stays out.

python tests/serve/load.py --minutes 15

Requests are sent when they are due, whether others were answered or not, from connections without number: as from many
devices. The client shares the machine with the server, so it is one that takes little of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import aiohttp  # noqa: E402
import numpy as np  # noqa: E402
from deployed import Operator  # noqa: E402
from served import Shop, digit_images, png, train_shop  # noqa: E402

from serve.codec import decode, media_type  # noqa: E402
from serve.connection import Patience, retry_after  # noqa: E402
from serve.deployment.head import HeadFile  # noqa: E402

TASK = "loop"
SHARE = 0.8
CONNECTIONS = 16
KILL_EVERY_S = 60.0
CAPACITY_S = 20.0
PATIENCE = Patience(total_s=60.0)
"""The client tries again as the edge client does."""
TIMEOUT_S = 20.0
"""Of an attempt."""


@dataclass(slots=True)
class Outcome:
    """Of a load."""

    capacity: float = 0.0
    """Requests a second, closed loop."""
    rate: float = 0.0
    answered: int = 0
    wrong: int = 0
    failed: int = 0
    """Attempts that brought no answer; each was made again."""
    given_up: int = 0
    kills: int = 0
    late_s: float = 0.0
    """How long after it was due a request was begun at the most: a client that cannot keep up measures itself."""
    seconds: list[float] = field(default_factory=list)
    """From when a request was due to when it was answered, tries included."""

    def __str__(self) -> str:
        times = sorted(self.seconds) or [0.0]
        p50, p99, most = (1000 * times[int(q * (len(times) - 1))] for q in (0.5, 0.99, 1.0))
        return (
            f"capacity {self.capacity:.0f} req/s, load {self.rate:.0f} req/s, {self.kills} replicas killed: "
            f"{self.answered} answered, {self.wrong} wrong, {self.failed} attempts failed and were made again, "
            f"{self.given_up} never answered; p50 {p50:.0f} ms, p99 {p99:.0f} ms, at the most {most:.0f} ms; "
            f"the client was at the most {1000 * self.late_s:.0f} ms late"
        )


class Client:
    """Publishes known images, compares what comes back, and tries again where nothing does."""

    def __init__(self, url: str, token: dict[str, str], wanted: np.ndarray) -> None:
        self.url, self.outcome, self._wanted = f"{url}/tasks/{TASK}/features", Outcome(), wanted
        self._bodies = [png(image) for image in digit_images(len(wanted))]
        self._headers = token | {"Accept": media_type("fp32")}
        self._atol = 2**-9 * float(np.abs(wanted).max())
        self._draw = random.Random(0)

    async def ask(self, client: aiohttp.ClientSession, number: int, due: float) -> None:
        """One image, until it is answered."""
        place = number % len(self._bodies)
        self.outcome.late_s = max(self.outcome.late_s, time.monotonic() - due)
        for attempt in itertools.count():
            asked_s = 0.0
            try:
                async with client.post(self.url, data=self._bodies[place], headers=self._headers) as response:
                    body = await response.read()
                    if response.status == 200:
                        self._judge(body, place, due)
                        return
                    asked_s = retry_after(response.headers.get("Retry-After"))
            except (aiohttp.ClientError, TimeoutError):
                pass
            self.outcome.failed += 1
            pause_s = PATIENCE.pause(attempt, asked_s, self._draw)
            if time.monotonic() - due + pause_s > PATIENCE.total_s:
                self.outcome.given_up += 1
                return
            await asyncio.sleep(pause_s)

    def _judge(self, body: bytes, place: int, due: float) -> None:
        z = decode(body, max_bytes=1 << 20, max_values=1 << 18)[0]["z"][0]
        right = z.shape == self._wanted[place].shape and np.allclose(z, self._wanted[place], atol=self._atol)
        self.outcome.wrong += not right
        self.outcome.answered += 1
        self.outcome.seconds.append(time.monotonic() - due)


async def under_load(client: Client, operator: Operator, *, minutes: float) -> Outcome:
    """Measure the capacity, then send `SHARE` of it, and kill."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
    ) as http:
        await _closed_loop(client, http, 3.0)
        capacity = await _closed_loop(client, http, CAPACITY_S)
        client.outcome = outcome = Outcome(capacity=capacity, rate=SHARE * capacity)
        began, asked = time.monotonic(), set[asyncio.Task[None]]()
        telling = asyncio.create_task(_tell(outcome, asked))
        for number in itertools.count():
            due = began + number / outcome.rate
            if due > began + 60 * minutes:
                break
            if due - began > KILL_EVERY_S * outcome.kills + KILL_EVERY_S / 2:
                await asyncio.to_thread(_kill_one, operator)
                outcome.kills += 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(client.ask(http, number, due))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
        telling.cancel()
    return outcome


async def _tell(outcome: Outcome, asked: set[asyncio.Task[None]]) -> None:
    """Every ten seconds, for whoever waits."""
    for seconds in itertools.count(10, 10):
        await asyncio.sleep(10)
        sys.stderr.write(
            f"{seconds:4} s  {outcome.rate:.0f} req/s, {outcome.kills} killed: {outcome.answered} answered, "
            f"{len(asked)} not yet, {outcome.failed} attempts failed\n"
        )


async def _closed_loop(client: Client, http: aiohttp.ClientSession, seconds: float) -> float:
    before, ends = client.outcome.answered, time.monotonic() + seconds

    async def one(number: int) -> None:
        while time.monotonic() < ends:
            await client.ask(http, number, time.monotonic())

    await asyncio.gather(*(one(number) for number in range(CONNECTIONS)))
    return (client.outcome.answered - before) / seconds


def _kill_one(operator: Operator) -> None:
    os.kill(random.choice(sorted(operator.replicas(TASK))), signal.SIGKILL)


def run(operator: Operator, *, minutes: float) -> Outcome:
    """Serve the task with two replicas, and load it."""
    operator.deploy("up", TASK, "--encoder-version", "1", "--port", str(operator.port), "--min-replicas", "2",
                    "--max-replicas", "2", "--metrics-port", str(operator.metrics_port))  # fmt: skip
    with Shop(operator.home, operator.home) as shop:
        token = shop.token("loader", "device", **{TASK: ["publish"]})
        wanted = shop.model(TASK).features(digit_images(32))
    return asyncio.run(under_load(Client(operator.url, token, wanted), operator, minutes=minutes))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        train_shop(home)
        operator = Operator(home)
        try:
            outcome = run(operator, minutes=options.minutes)
        finally:
            file = HeadFile(home / "serving")
            if (head := file.read()) is not None:
                file.stop(head)
            shutil.rmtree(file.scratch, ignore_errors=True)
    sys.stdout.write(f"{outcome}\n")
    return int(outcome.wrong > 0 or outcome.given_up > 0)


if __name__ == "__main__":
    raise SystemExit(main())
