"""The audit log: only added to, and whatever was done to its file shows."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import LedgerError
from serve.tenants.audit import AuditEntry, AuditHead, AuditLog, _digest

COLUMNS = {
    "at": "at + 1e-6",
    "tenant": "tenant || 'x'",
    "token": "upper(token)",
    "task": "'pose'",
    "verb": "'train'",
    "outcome": "outcome + 1",
    "detail": "detail || ' '",
    "digest": "zeroblob(32)",
    "number": "number + 1000",
}
N = 12


def write(log: AuditLog, number: int) -> None:
    log.write(tenant="alice", token="abcd", task="smile", verb="read", outcome=200, detail=f"feature {number}")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A log of N lines."""
    path = tmp_path_factory.mktemp("log") / "audit.db"
    with AuditLog(path) as log:
        for number in range(N):
            write(log, number)
    return path


@pytest.fixture
def path(written, tmp_path) -> Path:
    return Path(shutil.copy(written, tmp_path / "audit.db"))


def tamper(path: Path, *statements: str) -> None:
    """What somebody does who may write to the file, and knows how to take its triggers out."""
    db = sqlite3.connect(path)
    for trigger in ("lines_do_not_change", "lines_stay"):
        db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
    for statement in statements:
        assert db.execute(statement).rowcount != 0, statement
    db.commit()
    db.close()


def verified(path: Path, noted: AuditHead | None = None) -> AuditHead:
    with AuditLog(path) as log:
        return log.verify(noted)


@pytest.mark.parametrize("number", [1, N // 2, N])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_line_that_was_changed_shows_and_is_named(path, column, number):
    assert verified(path).lines == N
    tamper(path, f"UPDATE lines SET {column} = {COLUMNS[column]} WHERE number = {number}")
    said = f"line {number} is (not the one that was written|missing)"
    with pytest.raises(LedgerError, match=f"tampered with: {said}"):
        verified(path)


@pytest.mark.parametrize("number", [1, N // 2, N - 1])
def test_a_line_that_was_taken_out_shows_even_if_those_after_it_move_up(path, number):
    tamper(path, f"DELETE FROM lines WHERE number = {number}")
    with pytest.raises(LedgerError, match=f"line {number} is missing"):
        verified(path)
    moves = [f"UPDATE lines SET number = {later - 1} WHERE number = {later}" for later in range(number + 1, N + 1)]
    tamper(path, *moves)
    with pytest.raises(LedgerError, match=f"line {number} is not the one"):
        verified(path)


def test_a_line_that_was_forged_with_a_digest_that_fits_it_shows_in_the_next(path):
    with AuditLog(path) as log:
        line = dataclasses.replace(log.lines()[5], tenant="bob")
        with log._reading() as db:
            before = db.execute("SELECT digest FROM lines WHERE number = 5").fetchone()[0]
    digest = _digest(before, line).hex()
    tamper(path, f"UPDATE lines SET tenant = 'bob', digest = x'{digest}' WHERE number = 6")
    with pytest.raises(LedgerError, match="line 7 is not the one that was written"):
        verified(path)


def test_two_lines_that_changed_places_show(path):
    tamper(
        path,
        "UPDATE lines SET number = -1 WHERE number = 4",
        "UPDATE lines SET number = 4 WHERE number = 5",
        "UPDATE lines SET number = 5 WHERE number = -1",
    )
    with pytest.raises(LedgerError, match="line 4 is not the one"):
        verified(path)


def test_an_end_that_was_cut_off_shows_against_a_head_that_was_noted(path):
    noted = verified(path)
    tamper(path, f"DELETE FROM lines WHERE number > {N - 2}")
    assert verified(path).lines == N - 2, "the chain alone cannot know"
    with pytest.raises(LedgerError, match=f"it has {N - 2} lines, and had {N} when its head was noted"):
        verified(path, noted)


def test_a_chain_that_was_made_anew_shows_against_a_head_that_was_noted(path, tmp_path):
    noted = verified(path)
    with AuditLog(tmp_path / "forged.db") as forged:
        for number in range(N + 3):
            write(forged, number + (number == 5))
    assert verified(tmp_path / "forged.db").lines == N + 3
    with pytest.raises(LedgerError, match=f"line {N} is not the one that was noted"):
        verified(tmp_path / "forged.db", noted)


def test_a_head_that_was_noted_is_found_again_however_long_the_log_grew(path):
    noted = AuditHead.parse(str(verified(path)))
    with AuditLog(path) as log:
        write(log, 99)
    assert verified(path, noted).lines == N + 1
    assert verified(path, AuditHead(0, b"")).lines == N + 1


@pytest.mark.parametrize("statement", ["UPDATE lines SET outcome = 200", "DELETE FROM lines WHERE number = 3"])
def test_the_file_itself_refuses_to_change_or_drop_a_line(path, statement):
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="only added to"):
        db.execute(statement)
    db.close()


@settings(deadline=None, max_examples=80)
@given(
    texts=st.lists(st.text(max_size=400) | st.text(alphabet="a\n\r\0\x1b\udc80…", max_size=40), min_size=5, max_size=5)
)
def test_whatever_names_are_written_each_is_one_printable_line_and_the_chain_holds(tmp_path_factory, texts):
    tenant, token, task, verb, detail = texts
    with AuditLog(tmp_path_factory.mktemp("log") / "audit.db") as log:
        log.write(tenant=tenant, token=token, task=task, verb=verb, outcome=404, detail=detail)
        write(log, 1)
        assert log.verify().lines == 2
        line = log.lines()[0]
        for text in (line.tenant, line.token, line.task, line.verb, line.detail):
            assert text.isprintable()
            assert len(text) <= 300


def _write_many(path: Path, n: int) -> None:
    with AuditLog(path) as log:
        for number in range(n):
            write(log, number)


def test_processes_that_write_at_once_make_one_chain(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(tmp_path / "audit.db", 40)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert verified(tmp_path / "audit.db").lines == 120


def test_lines_that_are_written_together_are_in_the_chain_or_not_at_all(path):
    def entry(outcome: int | None) -> AuditEntry:
        return AuditEntry(tenant="bob", token="", task="smile", verb="read", outcome=outcome, detail="")

    with AuditLog(path) as log:
        log.write_all([entry(200), entry(404)])
        assert [line.outcome for line in log.lines(tenant="bob")] == [200, 404]
        with pytest.raises(TypeError):
            log.write_all([entry(200), entry(None)])
        assert log.verify().lines == N + 2


def test_lines_of_one_tenant_and_the_newest_of_them(path):
    with AuditLog(path) as log:
        log.write(tenant="bob", token="", task="smile", verb="read", outcome=404, detail="")
        assert [line.tenant for line in log.lines(tenant="bob")] == ["bob"]
        assert [line.number for line in log.lines(tenant="alice", last=2)] == [N - 1, N]
        assert log.lines(tenant="nobody") == []
