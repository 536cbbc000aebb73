"""A registry, a tenant in a thread, and sessions whose consumers may be elsewhere: for tests of remote training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from orchestrator.assembly import SessionPlan
from orchestrator.local import LocalConsumer, LocalProducer
from orchestrator.privacy.escrow import TenantKey
from orchestrator.session import Session
from serve.edge.link import Link, Patience
from serve.remote.listener import Listener
from serve.remote.trainer import Trained, Trainer, train
from serve.tenants.gate import Gate
from serve.tenants.registry import Registry

TASK = "left"
OUTCOME = {"version": "1.1-0123456789ab", "reason": ""}
"""What a listener tells of a task that is published."""


class Tenants:
    """A registry with one tenant, who may train `TASK`."""

    def __init__(self, path: Path) -> None:
        self.registry = Registry(path)
        self.token = self.registry.add("acme", role="tenant").token.text
        self.registry.grant("acme", TASK)
        self.gate = Gate(path)


class Tenant(threading.Thread):
    """A tenant's process, as a thread of this one."""

    def __init__(
        self,
        url: str,
        token: str,
        states: Path,
        *,
        link: Any = None,
        keep: Callable[[Trained], None] = lambda _: None,
        **options: Any,
    ) -> None:
        super().__init__(daemon=True)
        self.keep = keep
        self.trainer = Trainer(TenantKey.generate(), states, task=TASK, **options)
        self.link = link or Link(url, token, patience=Patience(total_s=20.0))
        self.outcome: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self.link:
                self.outcome = train(self.link, self.trainer, keep=self.keep)
        except BaseException as error:
            self.error = error


def open_session(plan: SessionPlan, listener: Listener | None = None, *, run: str = "a", **options: Any) -> Session:
    """`TASK` is elsewhere where there is a listener; everybody else is in this process."""
    producer = LocalProducer(plan)
    offers = producer.offers()
    consumers = [
        listener.consumer(offers[task], plan.consumer_config(task), run=run)
        if listener is not None and task == TASK
        else LocalConsumer(offers[task], plan.consumer_config(task))
        for task in plan.data.specs
    ]
    return Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=plan.config.epochs, **options)


def trained(session, state=None):
    """(epoch reports, outcome) of a session that is through; nobody was told yet."""
    session.start(state)
    return session.run(), session.finish()


def finish(session, listener, state=None):
    """The same, and the tenant is told."""
    found = trained(session, state)
    listener.tell({TASK: OUTCOME})
    return found


class Flaky(httpx.BaseTransport):
    """Loses requests on the way up, or answers on the way down, every so often."""

    def __init__(self, *, up: int, down: int) -> None:
        self._real, self._up, self._down, self._n = httpx.HTTPTransport(), up, down, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._n += 1
        if self._n % self._up == 0:
            raise httpx.ConnectError("lost on the way up")
        response = self._real.handle_request(request)
        if self._n % self._down == 0:
            response.read()
            raise httpx.ReadError("lost on the way down")
        return response

    def close(self) -> None:
        self._real.close()
