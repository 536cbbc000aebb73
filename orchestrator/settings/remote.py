"""Of commands whose tenants may train elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteSettings:
    """Tenants that train their heads in processes of their own, wherever these are; see `serve.edge.train`."""

    remote: str | None = None
    """HOST:PORT where a tenant's process finds this command; it is waited for. The tenant keeps its head, and the task
    is published without one."""
    remote_certificate: Path | None = None
    """PEM file of the certificate for that address. Without one the connection is plain HTTP."""
    remote_key: Path | None = None
    """PEM file of the certificate's key."""
    remote_patience_s: float = 600.0
    """So many seconds may pass without a word of the tenant before it counts as lost."""
    tenants: Path | None = None
    """The tenants' registry, which says whose token may train what. Default: tenants/registry.db in the storage."""

    def __post_init__(self) -> None:
        if not self.remote_patience_s > 0:
            raise ConfigError(f"remote_patience_s must be > 0, got {self.remote_patience_s}")
        if self.remote is None and (self.remote_certificate is not None or self.remote_key is not None):
            raise ConfigError("--remote-certificate and --remote-key are of --remote HOST:PORT: give it, or leave them")
