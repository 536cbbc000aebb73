"""Tenants of a run whose processes are elsewhere: who waits for them, and who tells them how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.catalog_records import TaskRecord
from orchestrator.runs.observer import RunObserver
from orchestrator.runs.opening import OpenConsumer, RemoteTenant
from orchestrator.runs.phase_two import SessionResult
from orchestrator.settings.remote import RemoteSettings
from orchestrator.settings.shared import RuntimeSettings

if TYPE_CHECKING:
    from serve.remote.listener import Listener


@dataclass(kw_only=True)
class RemoteTenants:
    """Those of one run; none where all are hosted."""

    observer: RunObserver
    listener: Listener | None = None
    tenants: Mapping[str, RemoteTenant] = field(default_factory=dict)
    run: str = ""
    """Its name, once it has one: by it tenants find what they kept."""

    def ended(self, records: Sequence[TaskRecord], session: SessionResult | None) -> None:
        """Tell each tenant the version that its head is for, or why there is none; and the user who did not hear it."""
        from serve.versions import served_version

        if self.listener is None:
            return
        stopped = {} if session is None else session.quarantined
        outcomes = {task: {"version": None, "reason": stopped.get(task, "")} for task in self.tenants}
        outcomes |= {r.spec.name: {"version": served_version(r)} for r in records if r.spec.name in self.tenants}
        for task in self.listener.tell(outcomes, run=self.run):
            version, reason = outcomes[task]["version"], outcomes[task].get("reason")
            known = f"it is published as {version}" if version else f"it is not published: {reason}"
            self.observer.on_stage(f"the tenant of {task} did not come to hear that {known}")


@contextmanager
def remote_tenants(
    tasks: Sequence[str], settings: RemoteSettings, runtime: RuntimeSettings, observer: RunObserver
) -> Iterator[RemoteTenants]:
    """Listen for the tenants of these tasks while the block runs, if the settings say where."""
    if settings.remote is None:
        yield RemoteTenants(observer=observer)
        return
    from serve.remote.listener import Endpoint, Listener
    from serve.tenants.gate import Gate, Places

    endpoint = Endpoint.parse(settings.remote, certificate=settings.remote_certificate, key=settings.remote_key)
    gate = Gate(settings.tenants or Places.in_storage(runtime.storage_path).registry)
    with Listener(tuple(tasks), endpoint, gate, patience_s=settings.remote_patience_s) as listener:
        observer.on_stage(f"tenants of {', '.join(tasks)} are waited for at {listener.url}")

        remote = RemoteTenants(observer=observer, listener=listener)

        def tenant(run: str) -> OpenConsumer:
            remote.run = run
            return partial(listener.consumer, run=run)

        remote.tenants = dict.fromkeys(tasks, tenant)
        yield remote
