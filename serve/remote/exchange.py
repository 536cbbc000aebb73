"""Between the session, which asks, and the tenant's process, which comes by over HTTP to answer.

One exchange a task. The session's threads queue works and wait; the process answers the first of the queue and takes
the next, in one request. A work is answered once, by its number within its sitting, and nothing is applied twice: whose
answer was taken already, or is to a sitting of another exchange, says that it is there, and gets the next work.

    process is heard first -> it is *the* process -> (another one comes: the first is refused from now on,
    and everything that was asked is lost, as it knows nothing of it: `PartyLostError`)
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, Generic, TypeVar

from orchestrator.errors import MetaMorphosisError, PartyLostError, ProtocolError
from serve.remote.messages import Array, Kind, Releases, Reply, Work, raise_error

T = TypeVar("T")
_LOOK_S: Final = 1.0
"""How often a waiting session looks whether the tenant is still heard of."""
_MOST_PROCESSES: Final = 1000
"""Of one tenant, in one training: names are remembered, and memory is not the tenant's to fill."""
_LONGEST_NAME: Final = 64


class TakenOverError(MetaMorphosisError):
    """Another process of the same tenant has taken the task over."""


class StaleAnswerError(MetaMorphosisError):
    """An answer to a work that is not at hand: it was taken already, or whoever asked for it is gone."""


class Asked(Generic[T]):
    """A `Pending` for the tenant's answer to one work."""

    def __init__(self, exchange: Exchange, work: Work, read: Callable[[Reply], T]) -> None:
        self.work, self._exchange, self._read = work, exchange, read
        self.future: Future[T] = Future()

    def result(self) -> T:
        """Wait for it. Raises `PartyLostError` when nothing was heard of the tenant for the exchange's patience."""
        while True:
            try:
                return self.future.result(timeout=_LOOK_S)
            except TimeoutError:
                if not self.future.done():
                    self._exchange.check_alive()

    def settle(self, reply: Reply) -> None:
        """Take the answer. Raises `ProtocolError`, and stays unanswered, if it cannot be read."""
        try:
            raise_error(self._exchange.task, reply)
        except MetaMorphosisError as error:
            self.future.set_exception(error)
            return
        self.future.set_result(self._read(reply))


class Exchange:
    """One task's. Safe to use from any thread."""

    def __init__(self, task: str, *, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``patience_s``: how long the tenant may be silent before it counts as lost."""
        self.task, self.patience_s, self._clock = task, patience_s, clock
        self._lock = threading.Lock()
        self._queue: deque[Asked[Any]] = deque()
        self._sitting, self._next_number = "", 0
        self._process, self._former = "", set[str]()
        self._broken = ""
        self._heard_at = clock()
        self._waiting: Future[None] | None = None
        self.over = False
        """Nothing more will be asked: the tenant has heard the end, or the listener closes."""

    # -- the session's side --------------------------------------------------------------------------------------------

    def begin(
        self, fields: Mapping[str, Any], read: Callable[[Reply], T], *, releases: Releases | None = None
    ) -> Asked[T]:
        """The first work of a new sitting. Whatever was asked before is forgotten."""
        return self._sit("begin", fields, read, releases)

    def end(self, fields: Mapping[str, Any], read: Callable[[Reply], T]) -> Asked[T]:
        """The last work, in a sitting of its own: any process of the tenant's can do it, also one that came for it.

        While the same end is asked already it is not asked anew: a process that is at it answers, and leaves for good.
        """
        with self._lock:
            if self._queue and (at_hand := self._queue[0]).work.kind == "end" and at_hand.work.fields == fields:
                return at_hand
        return self._sit("end", fields, read)

    def ask(
        self,
        kind: Kind,
        fields: Mapping[str, Any],
        arrays: Mapping[str, Array],
        read: Callable[[Reply], T],
        *,
        releases: Releases | None = None,
    ) -> Asked[T]:
        """Queue a work. What its ``read`` makes of the answer is the result.

        ``releases``: bounded features that it carries. Raises `PartyLostError` if the process that was asked before is
        gone; `begin` is what starts again.
        """
        with self._lock:
            if self._broken:
                raise PartyLostError(self._broken)
            return self._ask(kind, fields, arrays, read, releases)

    def forget(self) -> None:
        """Take back what was asked and not answered."""
        with self._lock:
            self._lose(PartyLostError(f"the session with the tenant of task {self.task!r} ended"))

    def close(self) -> None:
        """Let go of whoever waits for work."""
        with self._lock:
            self.over = True
            self._wake()

    def wait_for_tenant(self) -> None:
        """Until a process is there. Raises `PartyLostError` after the exchange's patience."""
        with self._lock:
            self._heard_at = self._clock()
        while True:
            with self._lock:
                if self._process:
                    return
            self.check_alive()
            time.sleep(0.05)

    def check_alive(self) -> None:
        """Raise `PartyLostError` if nothing was heard of the tenant for too long."""
        with self._lock:
            silent_s = self._clock() - self._heard_at
            if silent_s > self.patience_s:
                self._broken = f"the tenant of task {self.task!r} was not heard of for {silent_s:.0f} s"
                error = PartyLostError(self._broken)
                self._lose(error)
                raise error

    def _sit(
        self, kind: Kind, fields: Mapping[str, Any], read: Callable[[Reply], T], releases: Releases | None = None
    ) -> Asked[T]:
        with self._lock:
            self._lose(PartyLostError(f"the session with the tenant of task {self.task!r} began anew"))
            self._sitting, self._next_number, self._broken = secrets.token_hex(8), 0, ""
            self._heard_at = self._clock()
            return self._ask(kind, fields, {}, read, releases)

    def _ask(
        self,
        kind: Kind,
        fields: Mapping[str, Any],
        arrays: Mapping[str, Array],
        read: Callable[[Reply], T],
        releases: Releases | None,
    ) -> Asked[T]:
        work = Work(
            sitting=self._sitting,
            number=self._next_number,
            kind=kind,
            fields=fields,
            arrays=arrays,
            releases=releases,
        )
        self._next_number += 1
        asked = Asked(self, work, read)
        self._queue.append(asked)
        self._wake()
        return asked

    def _lose(self, error: MetaMorphosisError) -> None:
        while self._queue:
            self._queue.popleft().future.set_exception(error)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        self._waiting = None

    # -- the tenant's side ---------------------------------------------------------------------------------------------

    def room_for(self, tag: str) -> int:
        """The most numbers in an answer to the work of that tag; of no tag, in a message that answers none.

        Raises `StaleAnswerError` where that work is not the one at hand.
        """
        if not tag:
            return 0
        with self._lock:
            if not self._queue or self._queue[0].work.tag != tag:
                raise StaleAnswerError(f"that work of task {self.task!r} is not asked for: say that you are there")
            return self._queue[0].work.answer_values

    def take(self, reply: Reply) -> None:
        """Take what a process says, once.

        Raises `TakenOverError` for one that another has replaced, and `ProtocolError` for an answer that cannot be
        read, or is to a work that was never handed out; the work then waits for a better one.
        """
        with self._lock:
            self._meet(reply.process)
            if reply.sitting != self._sitting or not self._sitting:
                return
            if reply.number >= self._next_number - len(self._queue) + 1:
                raise ProtocolError(f"the tenant of task {self.task!r} answered work {reply.number} before it was sent")
            if self._queue and reply.number == self._queue[0].work.number:
                self._queue[0].settle(reply)
                self.over = self._queue.popleft().work.kind == "end"

    def first(self) -> tuple[Work | None, Future[None]]:
        """The work at hand, or None and a future that is done as soon as there may be one."""
        with self._lock:
            self._heard_at = self._clock()
            if self._queue:
                self._waiting = None
                done: Future[None] = Future()
                done.set_result(None)
                return self._queue[0].work, done
            if self._waiting is None:
                self._waiting = Future()
            return None, self._waiting

    def withhold(self, work: Work, error: MetaMorphosisError) -> None:
        """The result of a work that may not go out, nor what was asked after it; one of the past stays as it is."""
        with self._lock:
            if self._queue and self._queue[0].work is work:
                self._lose(error)

    def _meet(self, process: str) -> None:
        self._heard_at = self._clock()
        if process in self._former:
            raise TakenOverError(
                f"another process of the same tenant trains task {self.task!r} now; this one is not needed any more"
            )
        if process == self._process:
            return
        if len(process) > _LONGEST_NAME or len(self._former) >= _MOST_PROCESSES:
            raise ProtocolError(f"the tenant of task {self.task!r} has had too many processes, or names them too long")
        if self._process:
            self._former.add(self._process)
            if self._sitting and not self._at_beginning():
                self._broken = f"the process of the tenant of task {self.task!r} was started anew"
                self._lose(PartyLostError(self._broken))
        self._process = process

    def _at_beginning(self) -> bool:
        """Whether the sitting has only begun, so that a new process can begin it as well."""
        return bool(self._queue) and self._queue[0].work.number == 0
