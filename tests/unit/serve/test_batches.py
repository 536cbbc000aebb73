"""Jobs that are done together: nobody waits for others to come, and what came meanwhile is one batch."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serve import batches
from serve.batches import Batches


class Gauge:
    """Squares numbers, once it may, and remembers what came together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may, self.began = threading.Event(), threading.Event()

    def squares(self, numbers: list[int]) -> list[int | Exception]:
        self.batches.append(numbers)
        self.began.set()
        assert self.may.wait(10)
        return [ValueError(n) if n < 0 else n * n for n in numbers]


async def began(gauge: Gauge) -> None:
    assert await asyncio.to_thread(gauge.began.wait, 10)


def test_what_came_while_a_batch_was_computed_is_the_next_and_no_larger_than_it_may_be():
    gauge = Gauge()
    jobs = Batches(gauge.squares, name="test", max_batch=4)

    async def scenario() -> list[int]:
        first = jobs.do(1)
        await began(gauge)
        others = [jobs.do(n) for n in range(2, 8)]
        await asyncio.sleep(0)
        gauge.may.set()
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(scenario()) == [n * n for n in range(1, 8)]
    assert gauge.batches == [[1], [2, 3, 4, 5], [6, 7]]


def test_a_job_that_comes_alone_is_begun_at_once_again_and_again():
    gauge = Gauge()
    gauge.may.set()
    jobs = Batches(gauge.squares, name="test", max_batch=4)

    async def scenario() -> None:
        for n in range(50):
            assert await jobs.do(n) == n * n

    asyncio.run(scenario())
    assert gauge.batches == [[n] for n in range(50)]


def test_many_loops_are_each_told_their_own():
    gauge = Gauge()
    gauge.may.set()
    jobs = Batches(gauge.squares, name="test", max_batch=4)
    found: dict[int, int] = {}

    async def ask(base: int) -> None:
        for n in range(base, base + 100):
            found[n] = await jobs.do(n)

    threads = [threading.Thread(target=lambda base=base: asyncio.run(ask(base))) for base in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 300 and all(square == n * n for n, square in found.items())


def test_a_batch_may_be_given_time_to_fill_and_is_begun_when_it_is_full():
    gauge = Gauge()
    gauge.may.set()
    jobs = Batches(gauge.squares, name="test", max_batch=3, wait_s=30)

    async def scenario() -> None:
        await asyncio.wait_for(asyncio.gather(*(jobs.do(n) for n in range(3))), 10)

    asyncio.run(scenario())
    assert gauge.batches == [[0, 1, 2]]
    patient = Batches(gauge.squares, name="test", max_batch=3, wait_s=0.01)

    async def one() -> int:
        return await patient.do(5)

    assert asyncio.run(one()) == 25


def test_an_error_is_that_of_its_job_and_what_the_work_raises_is_everybodys():
    gauge = Gauge()
    gauge.may.set()

    async def all_of(jobs: Batches[int, int]) -> list[int | BaseException]:
        return await asyncio.gather(jobs.do(2), jobs.do(-1), return_exceptions=True)

    two, bad = asyncio.run(all_of(Batches(gauge.squares, name="test", max_batch=2)))
    assert two == 4 and isinstance(bad, ValueError)

    def broken(numbers: list[int]) -> list[int]:
        raise OSError("no")

    jobs = Batches(broken, name="test", max_batch=2)
    for _ in range(2):  # the thread goes on
        assert all(isinstance(found, OSError) for found in asyncio.run(all_of(jobs)))


def test_who_gives_up_does_not_disturb_the_others():
    gauge = Gauge()
    jobs = Batches(gauge.squares, name="test", max_batch=4)

    async def scenario() -> list[int]:
        first = jobs.do(1)
        await began(gauge)
        given_up, kept = jobs.do(2), jobs.do(3)
        await asyncio.sleep(0)
        given_up.cancel()
        gauge.may.set()
        return list(await asyncio.gather(first, kept))

    assert asyncio.run(scenario()) == [1, 9]
    assert gauge.batches == [[1], [3]]


def test_a_thread_that_is_at_one_batch_for_too_long_is_stuck(monkeypatch):
    monkeypatch.setattr(batches, "_STUCK_S", 0.1)
    gauge = Gauge()
    jobs = Batches(gauge.squares, name="test", max_batch=1)

    async def scenario() -> None:
        task = jobs.do(1)
        await began(gauge)
        jobs.check()
        time.sleep(0.15)
        with pytest.raises(RuntimeError, match="a batch has been computing"):
            jobs.check()
        gauge.may.set()
        await task
        jobs.check()

    asyncio.run(scenario())


class Threads:
    """Remembers which thread did each job."""

    def __init__(self) -> None:
        self.of: dict[int, threading.Thread] = {}
        self.takes_s = 0.0

    def work(self, numbers: list[int]) -> list[int]:
        time.sleep(self.takes_s)
        self.of |= dict.fromkeys(numbers, threading.current_thread())
        return numbers


def test_a_job_is_done_where_it_came_if_that_is_asked_for_and_it_is_quick():
    seen = Threads()
    jobs = Batches(seen.work, name="test", max_batch=4)

    async def scenario() -> None:
        assert await jobs.do(0, here=True) == 0  # nobody knows yet how long it takes
        while jobs._awake:
            await asyncio.sleep(0)
        jobs._alone_s = 0.0  # however slow this machine is
        future = jobs.do(1, here=True)
        assert future.done() and await future == 1
        assert await jobs.do(2) == 2
        while jobs._awake:
            await asyncio.sleep(0)
        jobs._alone_s, seen.takes_s = 0.0, 2 * batches._QUICK_S
        assert jobs.do(3, here=True).done()  # it was not known to take so long
        assert await jobs.do(4, here=True) == 4

    asyncio.run(scenario())
    assert {n for n, thread in seen.of.items() if thread is threading.main_thread()} == {1, 3}


def test_nothing_is_done_where_it_came_while_the_thread_is_at_it_or_a_batch_is_to_fill():
    gauge = Gauge()
    jobs = Batches(gauge.squares, name="test", max_batch=4)
    jobs._alone_s = 0.0

    async def scenario() -> None:
        first = jobs.do(1)
        await began(gauge)
        second = jobs.do(2, here=True)
        assert not second.done()
        gauge.may.set()
        assert await asyncio.gather(first, second) == [1, 4]
        patient = Batches(gauge.squares, name="test", max_batch=2, wait_s=0.01)
        patient._alone_s = 0.0
        third = patient.do(3, here=True)
        assert not third.done() and await third == 9

    asyncio.run(scenario())
    assert gauge.batches == [[1], [2], [3]]


def test_what_comes_while_a_job_is_done_where_it_came_is_done_after_it():
    came: list[int] = []
    others: list[threading.Thread] = []

    def work(numbers: list[int]) -> list[int]:
        if numbers == [1]:  # done here: this thread may not be kept, so another loop asks meanwhile
            others.append(threading.Thread(target=lambda: asyncio.run(ask(2))))
            others[0].start()
            while not jobs._waiting:
                time.sleep(0.001)
        came.extend(numbers)
        return numbers

    async def ask(number: int, *, here: bool = False) -> int:
        return await jobs.do(number, here=here)

    jobs = Batches(work, name="test", max_batch=4)
    jobs._alone_s = 0.0
    assert asyncio.run(ask(1, here=True)) == 1
    others[0].join(10)
    assert not others[0].is_alive() and came == [1, 2]


def test_an_error_of_a_job_that_is_done_where_it_came_is_its_own():
    def broken(numbers: list[int]) -> list[int]:
        raise OSError("no")

    jobs = Batches(broken, name="test", max_batch=2)
    jobs._alone_s = 0.0

    async def scenario() -> None:
        for _ in range(2):
            future = jobs.do(1, here=True)
            assert future.done()
            with pytest.raises(OSError, match="no"):
                await future

    asyncio.run(scenario())
