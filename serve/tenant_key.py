"""The private key of a tenant, in a file: with the producer's commands for sealed labels, and where a tenant trains."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from orchestrator.errors import DataError
from orchestrator.privacy.escrow import TenantKey
from serve.private_files import read_private, write_private

KEY_BYTES: Final = 32
_WHAT: Final = "the tenant's private key"


def read_tenant_key(path: Path, *, make: bool = False) -> TenantKey:
    """The private key in a file of 32 bytes that only its owner can read, made where there is none and ``make`` is set.

    Raises `DataError`.
    """
    if make and not path.exists():
        write_private(path, TenantKey.generate().to_bytes(), what=_WHAT)
    raw = read_private(path, what=_WHAT)
    if len(raw) != KEY_BYTES:
        raise DataError(
            f"{path} is no tenant's key, which is a file of {KEY_BYTES} bytes: name another, or one that is not there"
        )
    return TenantKey.from_bytes(raw)
