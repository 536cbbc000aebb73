"""A listener for the tiny session, and what starts a tenant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_parties import TASK, Tenant, Tenants

from serve.remote.listener import Endpoint, Listener


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(tmp_path / "tenants.db")


@pytest.fixture
def listener(tenants: Tenants) -> Iterator[Listener]:
    with Listener((TASK,), Endpoint.parse("127.0.0.1:0"), tenants.gate, patience_s=20.0) as opened:
        yield opened


@pytest.fixture
def start_tenant(listener: Listener, tenants: Tenants, tmp_path: Path) -> Callable[..., Tenant]:
    def start(**options: Any) -> Tenant:
        options.setdefault("states", tmp_path / "states")
        tenant = Tenant(listener.url, tenants.token, **options)
        tenant.start()
        return tenant

    return start
