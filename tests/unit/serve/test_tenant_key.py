"""A tenant's private key in a file."""

from __future__ import annotations

import pytest

from orchestrator.errors import DataError
from serve.tenant_key import read_tenant_key


def test_a_key_is_made_once_for_its_owner_alone_and_only_where_that_is_asked(tmp_path):
    path = tmp_path / "keys" / "key"
    with pytest.raises(DataError, match="cannot read the tenant's private key"):
        read_tenant_key(path)
    made = read_tenant_key(path, make=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_tenant_key(path).to_bytes() == read_tenant_key(path, make=True).to_bytes() == made.to_bytes()
    assert len(path.read_bytes()) == 32


def test_a_file_that_is_no_key_or_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "key"
    read_tenant_key(path, make=True)
    path.chmod(0o640)
    with pytest.raises(DataError, match="others can read the tenant's private key"):
        read_tenant_key(path, make=True)
    path.chmod(0o600)
    for wrong in (b"", b"short", bytes(33), bytes(1 << 17)):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"is no tenant's key|is too large"):
            read_tenant_key(path, make=True)
    with pytest.raises(DataError, match="cannot write the tenant's private key"):
        read_tenant_key(path / "key", make=True)
