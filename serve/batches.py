"""Jobs that are done together, by one thread.

A job that comes alone is begun at once. What comes while the thread is at it waits, and is its next batch: nobody waits
for a batch to fill, and the more is asked, the larger the batches. Where jobs are quick and come one by one, waking
the thread takes longer than the job: then it may be done where it comes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, Generic, TypeAlias, TypeVar

_STUCK_S: Final = 60.0
"""A batch that takes longer has not only many jobs."""

_QUICK_S: Final = 0.005
"""What takes no longer may keep an event loop from everything else."""

Job = TypeVar("Job")
Result = TypeVar("Result")
_Waiting: TypeAlias = tuple[Job, asyncio.Future[Result]]


class Batches(Generic[Job, Result]):
    """One thread, and the jobs that wait for it. Many event loops may give it jobs."""

    def __init__(
        self,
        work: Callable[[list[Job]], Sequence[Result | Exception]],
        *,
        name: str,
        max_batch: int,
        wait_s: float = 0.0,
    ) -> None:
        """``work`` gives one result a job, or the error of that job alone; what it raises is the error of them all.

        With ``wait_s`` a batch that is not full is begun so much later.
        """
        self._work, self._max_batch, self._wait_s = work, max_batch, wait_s
        self._waiting: deque[_Waiting[Job, Result]] = deque()
        self._came = threading.Condition()
        self._awake = False
        self._since: float | None = None
        self._alone_s = float("inf")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def do(self, job: Job, *, here: bool = False) -> asyncio.Future[Result]:
        """Its result, or its error. What is cancelled before the thread takes it is not done.

        ``here``: if the thread sleeps, and the last job that was alone was quick, it is done before this returns.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._came:
            here = here and not self._awake and not self._wait_s and self._alone_s < _QUICK_S
            if here:
                self._awake = True  # and what comes meanwhile waits
            else:
                self._waiting.append((job, future))
                self._came.notify()
                self._wake()
        if here:
            try:
                _tell(loop, [(job, future)], self._done([job]))
            finally:
                with self._came:
                    self._awake = False
                    if self._waiting:
                        self._wake()
        return future

    def check(self) -> None:
        """Raise where the thread has been at one batch for too long."""
        since = self._since
        if since is not None and time.monotonic() - since > _STUCK_S:
            raise RuntimeError(f"a batch has been computing for more than {_STUCK_S:g} s")

    def _done(self, jobs: list[Job]) -> Sequence[Result | Exception]:
        self._since = began = time.monotonic()
        try:
            results: Sequence[Result | Exception] = self._work(jobs)
            assert len(results) == len(jobs), "one result a job"
        except Exception as error:
            results = [error] * len(jobs)
        self._since = None
        if len(jobs) == 1:
            self._alone_s = time.monotonic() - began
        return results

    def _wake(self) -> None:
        """Of whoever holds the lock."""
        if not self._awake:
            self._awake = True
            self._pool.submit(self._work_on)

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _work_on(self) -> None:
        while batch := self._next():
            results = self._done([job for job, _ in batch])
            for loop in {future.get_loop() for _, future in batch}:
                with suppress(RuntimeError):  # it is closed: nobody waits
                    loop.call_soon_threadsafe(_tell, loop, batch, results)

    def _next(self) -> list[_Waiting[Job, Result]]:
        """Jobs that wait and were not given up, as many as may be; none: the thread sleeps until `do` wakes it."""
        with self._came:
            if self._wait_s and self._waiting:
                self._came.wait_for(lambda: len(self._waiting) >= self._max_batch, self._wait_s)
            batch: list[_Waiting[Job, Result]] = []
            while self._waiting and len(batch) < self._max_batch:
                waiting = self._waiting.popleft()
                if not waiting[1].cancelled():
                    batch.append(waiting)
            self._awake = bool(batch)
        return batch


def _tell(
    loop: asyncio.AbstractEventLoop, batch: Sequence[_Waiting[Job, Result]], results: Sequence[Result | Exception]
) -> None:
    for (_, future), result in zip(batch, results, strict=True):
        if future.get_loop() is not loop or future.done():  # another loop's, or given up
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
