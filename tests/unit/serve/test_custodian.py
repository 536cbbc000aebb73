"""Labels that are sealed to a tenant, and what opens them, which comes when it is time and not before."""

from __future__ import annotations

import multiprocessing
import pickle
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import ConfigError, LedgerError, ProtocolError
from orchestrator.privacy.escrow import TenantKey, open_labels, seal_labels
from orchestrator.wire import SealedLabels
from serve.tenants import custodian as module
from serve.tenants.audit import AuditLog
from serve.tenants.custodian import Custodian
from serve.tenants.errors import Refused

KEY = TenantKey.generate()
LABELS = np.random.default_rng(0).integers(0, 7, 200)
NOW, DUE = 1_000_000.0, 1_100_000.0


@pytest.fixture
def log(tmp_path):
    with AuditLog(tmp_path / "audit.db", clock=lambda: NOW) as log:
        yield log


@pytest.fixture
def custodian(tmp_path, log) -> Custodian:
    return again(tmp_path, log)


def again(tmp_path: Path, log: AuditLog) -> Custodian:
    """As another process would open it."""
    return Custodian(tmp_path / "custody", tmp_path / "keys" / "custody.key", log)


def sealed(subset="train") -> SealedLabels:
    return seal_labels(LABELS, task="smile", subset=subset, key=KEY.public_key("smile"), n_classes=7)


@pytest.fixture
def early(custodian) -> SealedLabels:
    """What the tenant has before it is time."""
    return custodian.deposit("alice", sealed(), not_before=DUE, now=NOW)


def opened(early: SealedLabels, wrapped_key: bytes, key: TenantKey = KEY):
    return open_labels(replace(early, wrapped_key=wrapped_key), key, task="smile", subset="train")


def refusal(custodian: Custodian, now: float, tenant="alice", task="smile", subset="train") -> Refused:
    with pytest.raises(Refused) as refused:
        custodian.release(tenant, task, subset, now)
    return refused.value


def store(custodian: Custodian) -> Path:
    (path,) = custodian.folder.glob("custody-*.sealed")
    return path


def test_when_it_is_time_the_tenant_reads_its_labels_with_what_it_was_given_before(custodian, early):
    for now in (DUE, DUE + 1, DUE + 1e6):
        np.testing.assert_array_equal(opened(early, custodian.release("alice", "smile", "train", now)), LABELS)


def test_before_it_is_time_nothing_is_released_and_it_is_said_how_long_to_wait(custodian, early):
    for now in (NOW, DUE - 0.001):
        refused = refusal(custodian, now)
        assert refused.status == 403
        assert refused.retry_after == pytest.approx(DUE - now)
    assert early.wrapped_key == b""
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(early, b"")


def test_another_key_opens_nothing(custodian, early):
    wrapped = custodian.release("alice", "smile", "train", DUE)
    with pytest.raises(ProtocolError, match="cannot be opened"):
        opened(early, wrapped, TenantKey.generate())


@pytest.mark.parametrize("part", ["nonce", "ciphertext", "wrapped_key"])
def test_a_changed_byte_of_what_the_tenant_has_is_noticed(custodian, early, part):
    whole = replace(early, wrapped_key=custodian.release("alice", "smile", "train", DUE))
    for position in (0, len(getattr(whole, part)) - 1):
        raw = bytearray(getattr(whole, part))
        raw[position] ^= 1
        with pytest.raises(ProtocolError, match="cannot be opened"):
            open_labels(replace(whole, **{part: bytes(raw)}), KEY, task="smile", subset="train")


def test_the_custodian_itself_cannot_read_labels(custodian, early, tmp_path):
    """What it holds is sealed to the tenant: the store's plain content has neither labels nor their key in it."""
    wrapped = custodian.release("alice", "smile", "train", DUE)
    state = custodian._load()
    assert state.entries["alice", "smile", "train"].wrapped_key == wrapped
    assert early.ciphertext.hex() not in state.to_bytes().decode()


def test_nobody_is_released_what_is_held_for_another_or_not_at_all(custodian, early):
    asked = [("bob", "smile", "train"), ("alice", "pose", "train"), ("alice", "smile", "test"), ("", "", "")]
    refused = [refusal(custodian, DUE, *name) for name in asked]
    assert {(error.status, error.title, error.retry_after) for error in refused} == {(404, refused[0].title, None)}


def test_a_time_that_was_set_stays(custodian, early):
    with pytest.raises(ConfigError, match="erase them first"):
        custodian.deposit("alice", sealed(), not_before=NOW, now=NOW)
    assert refusal(custodian, NOW).status == 403


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["early", "in time"])
def test_a_clock_that_is_set_back_is_noticed_by_the_next_process_too(custodian, early, tmp_path, log, asked):
    """Set forward to open early, and set back to hide it: or only set back."""
    if asked == "early":
        refusal(custodian, DUE - 100)
        seen = DUE - 100
    else:
        custodian.release("alice", "smile", "train", DUE + 100)
        seen = DUE + 100
    for one in (custodian, again(tmp_path, log)):
        with pytest.raises(LedgerError, match="the clock was set back"):
            one.release("alice", "smile", "train", seen - 60)
        with pytest.raises(LedgerError, match="the clock was set back"):
            one.deposit("alice", sealed("test"), not_before=seen, now=seen - 60)
    assert [line.outcome for line in log.lines() if "set back" in line.detail] == [503, 503]
    np.testing.assert_array_equal(opened(early, custodian.release("alice", "smile", "train", DUE + 100)), LABELS)


def test_a_clock_that_is_set_back_opens_nothing_of_a_release_that_was_due_by_it(custodian, early):
    custodian.deposit("alice", sealed("test"), not_before=NOW + 10, now=NOW)
    refusal(custodian, NOW + 1000, subset="train")
    with pytest.raises(LedgerError, match="the clock was set back"):
        custodian.release("alice", "smile", "test", NOW + 20)


def test_clocks_of_threads_may_disagree_by_a_moment(custodian, early):
    custodian.release("alice", "smile", "train", DUE + 4)
    custodian.release("alice", "smile", "train", DUE + 1)


@pytest.mark.parametrize("now", [float("nan"), float("inf")])
def test_a_time_that_is_none_opens_nothing(custodian, early, now):
    with pytest.raises(ConfigError, match="finite"):
        custodian.release("alice", "smile", "train", now)
    with pytest.raises(ConfigError, match="finite"):
        custodian.deposit("alice", sealed("test"), not_before=now, now=NOW)


# -- erasure -----------------------------------------------------------------------------------------------------------


def test_what_was_erased_is_released_never_again_and_to_nobody(custodian, early):
    assert custodian.erase("alice", "smile", "train").released is None
    assert refusal(custodian, DUE).status == 404
    assert custodian.held() == []
    with pytest.raises(ConfigError, match="are held for 'alice'"):
        custodian.erase("alice", "smile", "train")


def test_copies_of_the_store_from_before_an_erasure_cannot_be_opened_any_more(custodian, early, tmp_path):
    custodian.deposit("alice", sealed("test"), not_before=DUE, now=NOW)
    copy = store(custodian).read_bytes()
    custodian.erase("alice", "smile", "train")
    path = store(custodian)
    whole = path.read_bytes()
    path.write_bytes(copy)
    with pytest.raises(LedgerError, match="not the custody that was written last"):
        custodian.release("alice", "smile", "train", DUE)
    path.write_bytes(whole)
    custodian.release("alice", "smile", "test", DUE)
    with pytest.raises(Refused):
        custodian.release("alice", "smile", "train", DUE)


def test_no_earlier_key_is_left_in_any_file(custodian, early, tmp_path):
    before = custodian._key()[1]
    custodian.erase("alice", "smile", "train")
    assert custodian._key()[1] != before
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and before in path.read_bytes()]
    assert len(list(custodian.folder.glob("custody-*"))) == 1


def test_erasing_needs_no_right_clock_and_with_the_last_the_time_is_forgotten(custodian, early):
    refusal(custodian, NOW + 50_000)
    custodian.erase("alice", "smile", "train")
    custodian.deposit("alice", sealed(), not_before=NOW, now=NOW)
    custodian.release("alice", "smile", "train", NOW)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_any_changed_byte_of_the_store_or_of_its_key_is_noticed(custodian, early):
    for path in (store(custodian), custodian.key_file):
        raw = path.read_bytes()
        for position in {*range(0, len(raw), 7), len(raw) - 1}:
            changed = bytearray(raw)
            changed[position] ^= 1
            path.write_bytes(bytes(changed))
            with pytest.raises(LedgerError):
                custodian.release("alice", "smile", "train", DUE)
        path.write_bytes(raw[:-1])
        with pytest.raises(LedgerError):
            custodian.release("alice", "smile", "train", DUE)
        path.write_bytes(raw)
    custodian.release("alice", "smile", "train", DUE)


def test_the_key_of_another_custody_opens_nothing(custodian, early, tmp_path, log):
    other = Custodian(tmp_path / "other", tmp_path / "other.key", log)
    other.deposit("alice", sealed(), not_before=NOW, now=NOW)
    custodian.key_file.write_bytes(other.key_file.read_bytes())
    with pytest.raises(LedgerError, match="is the key of another"):
        custodian.release("alice", "smile", "train", DUE)


@pytest.mark.parametrize("lost", ["key", "store"])
def test_a_file_that_is_lost_is_not_taken_for_an_empty_custody(custodian, early, lost):
    (custodian.key_file if lost == "key" else store(custodian)).unlink()
    for ask in (
        lambda: custodian.release("alice", "smile", "train", DUE),
        lambda: custodian.deposit("alice", sealed(), not_before=NOW, now=NOW),
        custodian.held,
    ):
        with pytest.raises(LedgerError, match=r"is missing|cannot read"):
            ask()


def test_files_are_for_their_owner_alone_and_others_keys_are_not_used(custodian, early):
    for path in (store(custodian), custodian.key_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(custodian.folder.stat().st_mode) == 0o700
    custodian.key_file.chmod(0o640)
    with pytest.raises(LedgerError, match="chmod 600"):
        custodian.release("alice", "smile", "train", DUE)


def test_no_name_and_no_key_can_be_read_in_the_store(custodian, early):
    raw = store(custodian).read_bytes()
    assert b"alice" not in raw
    assert custodian._load().entries["alice", "smile", "train"].wrapped_key not in raw


@pytest.mark.parametrize("crash_before", ["store", "key"])
@pytest.mark.parametrize("first", [True, False])
def test_a_crash_at_any_moment_leaves_what_was_before(custodian, log, tmp_path, monkeypatch, crash_before, first):
    if not first:
        custodian.deposit("alice", sealed(), not_before=DUE, now=NOW)
    write, before = module.write_private, custodian.held()

    def crash(path, data, *, what, replace=False):
        is_key = "key" in what and not (first and data[24:32] == bytes(8))
        if is_key == (crash_before == "key"):
            raise KeyboardInterrupt
        write(path, data, what=what, replace=replace)

    monkeypatch.setattr(module, "write_private", crash)
    with pytest.raises(KeyboardInterrupt):
        custodian.deposit("alice", sealed("test"), not_before=DUE, now=NOW)
    monkeypatch.undo()
    assert again(tmp_path, log).held() == before
    custodian.deposit("alice", sealed("test"), not_before=DUE, now=NOW)
    assert len(custodian.held()) == len(before) + 1
    assert len(list(custodian.folder.glob("custody-*"))) == 1


def deposit_many(folder: Path, number: int) -> None:
    with AuditLog(folder / "audit.db") as log:
        custodian = again(folder, log)
        for i in range(5):
            custodian.deposit("alice", sealed(f"{number}-{i}"), not_before=DUE, now=NOW)


def test_processes_that_deposit_at_once_lose_nothing(custodian, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=deposit_many, args=(tmp_path, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(custodian.held()) == 10


# -- the log, and where it stays ---------------------------------------------------------------------------------------


def test_everything_is_written_down_and_no_key_is(custodian, early, log):
    refusal(custodian, NOW)
    refusal(custodian, NOW, "bob")
    wrapped = custodian.release("alice", "smile", "train", DUE)
    custodian.erase("alice", "smile", "train")
    lines = log.lines()
    assert [(line.tenant, line.task, line.verb, line.outcome) for line in lines] == [
        ("alice", "smile", "seal", 201),
        ("alice", "smile", "release", 403),
        ("bob", "smile", "release", 404),
        ("alice", "smile", "release", 200),
        ("alice", "smile", "erase", 200),
    ]
    assert wrapped.hex() not in str(lines)
    log.verify()


def test_a_release_that_cannot_be_written_down_is_none(custodian, early, log, monkeypatch):
    def full(**_: object) -> None:
        raise LedgerError("disk full")

    monkeypatch.setattr(AuditLog, "write", lambda self, **line: full())
    with pytest.raises(LedgerError, match="disk full"):
        custodian.release("alice", "smile", "train", DUE)


def test_who_asks_in_vain_cannot_fill_the_log(custodian, early, log):
    for i in range(100):
        refusal(custodian, NOW + i / 100)
    refusal(custodian, NOW + 61)
    told = [line.detail for line in log.lines() if line.outcome == 403]
    assert len(told) == 2
    assert told[1].endswith("99 more refusals before it")


def test_a_custodian_does_not_travel(custodian):
    with pytest.raises(TypeError, match="stays in the process"):
        pickle.dumps(custodian)


def test_what_is_told_of_what_is_held_has_no_key(custodian, early):
    (entry,) = custodian.held()
    assert (entry.name, entry.not_before, entry.wrapped_key) == (("alice", "smile", "train"), DUE, b"")
    assert "wrapped_key" not in repr(custodian._load())
