"""The registry's file: what it refuses whoever writes to it, and what is asked of names."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, LedgerError, UnknownNameError
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from serve.tenants.audit import AuditLog
from serve.tenants.registry import Registry, book_features


@pytest.fixture
def registry(tmp_path: Path):
    with Registry(tmp_path / "registry.db", clock=lambda: 1000.0) as registry:
        registry.add("alice", "tenant", expires=2000.0)
        registry.add("bob", "tenant")
        registry.grant("alice", "smile")
        with registry._transaction() as db:
            book_features(db, 1, "smile", 5)
        registry.revoke("bob")
        yield registry


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE usage SET features = 4", "cannot be taken back"),
        ("UPDATE usage SET task = 'pose'", "cannot be taken back"),
        ("DELETE FROM usage", "cannot be taken back"),
        ("REPLACE INTO usage (tenant, task, features) VALUES (1, 'smile', 0)", "cannot be taken back"),
        ("UPDATE tokens SET revoked = NULL WHERE tenant = 2", "ends sooner"),
        ("UPDATE tokens SET expires = NULL WHERE tenant = 1", "ends sooner"),
        ("UPDATE tokens SET expires = 2001 WHERE tenant = 1", "ends sooner"),
        ("UPDATE tokens SET digest = zeroblob(32)", "ends sooner"),
        ("UPDATE tokens SET tenant = 2 WHERE tenant = 1", "ends sooner"),
        ("DELETE FROM tokens", "stays known"),
        ("UPDATE tenants SET role = 'operator' WHERE id = 2", "keeps its name"),
        ("UPDATE tenants SET name = 'carol' WHERE id = 2", "keeps its name"),
        ("DELETE FROM tenants WHERE id = 2", "stays known"),
        ("INSERT INTO grants VALUES (1, 'smile', 'operate')", "CHECK"),
        ("INSERT INTO grants VALUES (99, 'smile', 'read')", "FOREIGN KEY"),
        ("UPDATE usage SET features = 'many'", "cannot store TEXT"),
    ],
)
def test_the_file_refuses_what_would_make_somebody_more_than_he_is(registry, statement, says):
    before = registry.tenants()
    db = sqlite3.connect(registry.path)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA recursive_triggers = ON")
    with pytest.raises(sqlite3.IntegrityError, match=says):
        db.execute(statement)
    db.close()
    assert registry.tenants() == before


def test_a_count_that_is_replaced_is_refused_on_the_connections_of_the_program_itself(registry):
    with pytest.raises(LedgerError, match="cannot be taken back"), registry._transaction() as db:
        db.execute("REPLACE INTO usage (tenant, task, features) VALUES (1, 'smile', 0)")
    assert registry.tenant("alice").grants[0].features == 5


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=80) | st.text(alphabet="alice'\";-_%*./\\\0\udc80 ", min_size=1, max_size=30))
def test_a_name_is_taken_as_it_is_or_refused_and_is_never_sql(tmp_path_factory, name):
    with Registry(tmp_path_factory.mktemp("registry") / "registry.db") as registry:
        registry.add("alice", "tenant")
        for act in (lambda: registry.add(name, "tenant"), lambda: registry.grant("alice", name)):
            try:
                act()
            except ConfigError as error:
                assert "use at most 63" in str(error) or name == "alice"
        assert {tenant.name for tenant in registry.tenants()} <= {"alice", name}
        assert {grant.task for grant in registry.tenant("alice").grants} <= {name}


def test_names_that_nobody_has_are_refused_with_those_there_are(registry):
    for act in (
        lambda: registry.revoke("carol"),
        lambda: registry.rotate("carol"),
        lambda: registry.grant("carol", "smile"),
        lambda: registry.set_rate("carol", 5),
        lambda: registry.tenant("carol"),
    ):
        with pytest.raises(UnknownNameError, match="known: alice, bob"):
            act()
    with pytest.raises(UnknownNameError, match="'pose'; known: smile"):
        registry.take_back("alice", "pose")
    with pytest.raises(UnknownNameError, match="token of 'bob'"):
        registry.revoke("bob", registry.tenant("alice").tokens[0].id)


def test_one_who_is_refused_a_token_is_not_there_afterwards(registry):
    with pytest.raises(ConfigError, match="in the future"):
        registry.add("carol", "tenant", expires=999.0)
    assert [tenant.name for tenant in registry.tenants()] == ["alice", "bob"]


def test_every_file_is_for_its_owner_alone_from_its_first_byte(tmp_path):
    with (
        Registry(tmp_path / "registry.db") as registry,
        AuditLog(tmp_path / "audit.db") as log,
        BitLedger(tmp_path / "bits.db") as bits,
    ):
        registry.add("alice", "tenant")
        log.write(tenant="a", token="", task="t", verb="read", outcome=200, detail="")
        bits.set_limit("alice", "smile", 1.0)
        files = sorted(path.name for path in tmp_path.iterdir())
        assert len(files) == 9, files  # each with its -wal and -shm
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
