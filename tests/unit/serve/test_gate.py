"""The gate: who is let in, what is booked, and how soon a change is felt, by any process."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import BitBudgetExceededError, ConfigError, LedgerError
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from serve.tenants.audit import AuditLog
from serve.tenants.gate import EVERY_TASK, Gate, Refused
from serve.tenants.registry import Registry, book_features

BITS = 4 * math.log2(5)


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock):
    with Registry(tmp_path / "tenants.db", clock=clock) as registry:
        yield registry


@pytest.fixture
def gate(registry: Registry, clock: Clock):
    gate = Gate(registry.path, clock=clock, monotonic=clock)
    yield gate
    gate.close()


@pytest.fixture
def alice(registry: Registry) -> str:
    """The header of a tenant that may do everything with one task."""
    issued = registry.add("alice", "tenant")
    registry.grant("alice", "smile")
    return header(issued)


def header(issued) -> str:
    return f"Bearer {issued.token.text}"


def status(gate: Gate, authorization, task="smile", verb="read", **more) -> int:
    try:
        gate.admit(authorization, task=task, verb=verb, **more)
    except Refused as error:
        return error.status
    return 200


def charge(gate: Gate, authorization: str, features: int = 1, *, bits=None, digests=(), fresh=False) -> int:
    try:
        gate.admit(authorization, task="smile", verb="read").charge(digests, "1", bits, fresh, features)
    except Refused as error:
        return error.status
    return 200


def test_a_token_that_is_revoked_is_refused_from_the_next_request_on(gate, registry, alice):
    assert status(gate, alice) == 200
    registry.revoke("alice")  # over another connection, as another process would
    assert status(gate, alice) == 401


def test_one_token_is_revoked_and_the_other_goes_on(gate, registry, alice):
    other = registry.rotate("alice", grace_s=3600)
    registry.revoke("alice", other.token.id)
    assert status(gate, alice) == 200
    assert status(gate, header(other)) == 401


def test_a_grant_that_is_taken_back_ends_at_once_and_says_no_more_than_a_task_that_is_not_there(gate, registry, alice):
    assert status(gate, alice) == 200
    registry.take_back("alice", "smile")
    assert status(gate, alice) == status(gate, alice, task="no-such-task") == 404


def test_an_admission_that_is_open_ends_with_its_token_or_its_grant(gate, registry, alice):
    admission = gate.admit(alice, task="smile", verb="read")
    admission.recheck()
    admission.charge((), "1", None, False, 1)
    registry.take_back("alice", "smile")
    for act in (admission.recheck, lambda: admission.charge((), "1", None, False, 1)):
        with pytest.raises(Refused) as refused:
            act()
        assert refused.value.status == 404
    registry.revoke("alice")
    for act in (admission.recheck, lambda: admission.charge((), "1", None, False, 1)):
        with pytest.raises(Refused) as refused:
            act()
        assert refused.value.status == 401
    assert registry.tenant("alice").grants[0].features == 1


def test_a_token_is_refused_from_the_second_in_which_it_expires(gate, registry, clock):
    issued = registry.add("bob", "tenant", expires=clock.now + 60)
    registry.grant("bob", "smile")
    clock.now += 59.9
    assert status(gate, header(issued)) == 200
    clock.now += 0.1
    assert status(gate, header(issued)) == 401


@pytest.mark.parametrize("grace", [0, 300])
def test_a_rotated_token_is_accepted_for_the_time_of_grace_and_replayed_in_vain_afterwards(
    gate, registry, clock, alice, grace
):
    new = header(registry.rotate("alice", grace_s=grace))
    assert status(gate, new) == 200
    if grace:
        clock.now += grace - 1
        assert status(gate, alice) == 200
        clock.now += 1
    assert status(gate, alice) == 401
    assert status(gate, new) == 200


def test_grace_does_not_lengthen_a_tokens_life(gate, registry, clock):
    old = header(registry.add("bob", "tenant", expires=clock.now + 10))
    registry.grant("bob", "smile")
    registry.rotate("bob", grace_s=1000)
    clock.now += 11
    assert status(gate, old) == 401


def test_an_operator_operates_every_task_and_reads_none(gate, registry):
    root = header(registry.add("root", "operator"))
    assert status(gate, root, task=EVERY_TASK, verb="operate") == 200
    assert status(gate, root, task="smile", verb="operate") == 200
    assert status(gate, root, task="smile", verb="read") == 404
    assert status(gate, root, task="smile", verb="publish") == 404


def test_a_verb_beyond_the_role_is_refused_even_if_the_file_grants_it(gate, registry):
    camera = header(registry.add("camera", "device"))
    with registry._transaction() as db:
        db.execute("INSERT INTO grants VALUES (1, 'smile', 'read')")
    assert status(gate, camera, verb="read") == 404


# -- quotas ------------------------------------------------------------------------------------------------------------


def test_features_are_counted_and_the_quota_is_never_passed(gate, registry, alice):
    registry.set_features("alice", "smile", 10)
    assert charge(gate, alice, 7) == 200
    assert charge(gate, alice, 4) == 403
    assert status(gate, alice, features=4) == 403
    assert status(gate, alice, features=3) == 200
    assert charge(gate, alice, 3) == 200
    assert charge(gate, alice, 1) == 403
    assert charge(gate, alice, 0) == 200
    assert registry.tenant("alice").grants[0].features == 10
    registry.take_back("alice", "smile")
    registry.grant("alice", "smile")
    assert charge(gate, alice, 1) == 403, "a new grant does not bring back what was used"


def test_a_number_of_features_below_none_is_refused(gate, alice):
    with pytest.raises(ConfigError, match="from 0"):
        gate.admit(alice, task="smile", verb="read").charge((), "1", None, False, -1)


@settings(deadline=None, max_examples=60)
@given(limit=st.none() | st.integers(0, 40), asked=st.lists(st.integers(0, 15), max_size=12))
def test_whatever_is_asked_for_the_sum_of_what_was_let_out_is_what_is_booked(tmp_path_factory, limit, asked):
    with Registry(tmp_path_factory.mktemp("gate") / "tenants.db") as registry:
        alice = header(registry.add("alice", "tenant"))
        registry.grant("alice", "smile")
        registry.set_features("alice", "smile", limit)
        gate, used = Gate(registry.path), 0
        for features in asked:
            fits = limit is None or used + features <= limit
            assert charge(gate, alice, features) == (200 if fits else 403)
            used += features if fits else 0
        assert registry.tenant("alice").grants[0].features == used
        gate.close()


def test_what_is_charged_together_is_let_out_or_refused_one_by_one(gate, registry, alice):
    registry.set_features("alice", "smile", 2)
    others = {}
    for name in ("revoked", "ungranted", "bob"):
        others[name] = header(registry.add(name, "tenant"))
        registry.grant(name, "smile")
    asked = [alice, others["revoked"], alice, others["ungranted"], alice, others["bob"]]
    admissions = [gate.admit(authorization, task="smile", verb="read") for authorization in asked]
    registry.revoke("revoked")
    registry.take_back("ungranted", "smile")
    found = gate.charge_each([(admission, "7") for admission in admissions])
    assert [refusal and refusal.status for refusal in found] == [None, 401, None, 404, 403, None]
    booked = {tenant.name: tenant.grants[0].features for tenant in registry.tenants()}
    assert booked == {"alice": 2, "revoked": 0, "ungranted": 0, "bob": 1}
    with AuditLog(gate.places.audit) as log:
        written = [(line.tenant, line.outcome, line.detail) for line in log.lines()]
    assert sorted(written) == [
        ("alice", 403, "1 features of version 7"),
        ("revoked", 401, "1 features of version 7"),
        ("ungranted", 404, "1 features of version 7"),
    ]
    assert gate.charge_each([]) == []


def test_where_one_of_several_cannot_be_booked_none_is(gate, registry, alice, monkeypatch):
    booked = []

    def until_the_disk_is_full(db, *args):
        if len(booked) == 2:
            raise sqlite3.OperationalError("database or disk is full")
        booked.append(book_features(db, *args))

    monkeypatch.setattr("serve.tenants.gate.book_features", until_the_disk_is_full)
    admission = gate.admit(alice, task="smile", verb="read")
    with pytest.raises(LedgerError, match="disk is full"):
        gate.charge_each([(admission, "1")] * 3)
    assert len(booked) == 2 and registry.tenant("alice").grants[0].features == 0


def test_bits_are_charged_once_for_keyed_noise_and_refused_where_they_are_used_up(gate, alice):
    digests = [number.to_bytes(16, "big") for number in range(4)]
    with BitLedger(gate.places.bits) as bits:
        assert charge(gate, alice, bits=BITS, digests=digests[:1]) == 403, "no limit: nothing may be released"
        bits.set_limit("alice", "smile", 3 * BITS)
        assert charge(gate, alice, 2, bits=BITS, digests=digests[:2]) == 200
        assert charge(gate, alice, 2, bits=BITS, digests=digests[:2]) == 200
        assert charge(gate, alice, 2, bits=BITS, digests=digests[2:]) == 403
        assert charge(gate, alice, 1, bits=BITS, digests=digests[2:3]) == 200
        assert charge(gate, alice, 1, bits=BITS, digests=digests[3:]) == 403
        assert bits.spent("alice", "smile") == 3 * BITS


def test_a_training_is_charged_bits_and_neither_features_nor_requests(gate, registry, alice):
    registry.set_features("alice", "smile", 0)
    digests = [number.to_bytes(16, "big") for number in range(4)]
    admission = gate.admit(alice, task="smile", verb="train")
    with BitLedger(gate.places.bits) as bits:
        with pytest.raises(Refused) as refused:
            admission.charge_training(digests[:1], "training a", BITS)
        assert refused.value.status == 403
        assert isinstance(refused.value.__cause__, BitBudgetExceededError)
        bits.set_limit("alice", "smile", 3 * BITS)
        for n in (2, 2, 3):
            admission.charge_training(digests[:n], "training a", BITS)
        with pytest.raises(Refused):
            admission.charge_training(digests, "training a", BITS)
        admission.charge_training((), "training a", BITS, releases=3)
        with pytest.raises(Refused):
            admission.charge_training((), "training a", BITS, releases=4)
        assert bits.spent("alice", "smile") == 3 * BITS
    assert registry.tenant("alice").grants[0].features == 0
    with AuditLog(gate.places.audit) as log:
        told = [line.detail for line in log.lines() if line.outcome == 403]
    assert told == [f"{n} features of training a, {BITS:g} bits each" for n in (1, 4, 4)]


def test_a_training_ends_with_the_grant(gate, registry, alice):
    admission = gate.admit(alice, task="smile", verb="train")
    with BitLedger(gate.places.bits) as bits:
        bits.set_limit("alice", "smile", math.inf)
        registry.take_back("alice", "smile")
        with pytest.raises(Refused) as refused:
            admission.charge_training([bytes(16)], "training a", BITS)
        assert refused.value.status == 404
        assert bits.spent("alice", "smile") == 0


def test_no_bits_are_spent_on_features_that_the_quota_does_not_let_out(gate, registry, alice):
    registry.set_features("alice", "smile", 1)
    with BitLedger(gate.places.bits) as bits:
        bits.set_limit("alice", "smile", 100 * BITS)
        assert charge(gate, alice, 2, bits=BITS, digests=[bytes(16), bytes(15) + b"\1"], fresh=True) == 403
        assert bits.spent("alice", "smile") == 0


def test_no_feature_is_counted_where_the_bits_do_not_suffice(gate, registry, alice):
    with BitLedger(gate.places.bits) as bits:
        bits.set_limit("alice", "smile", BITS)
        assert charge(gate, alice, 2, bits=BITS, digests=[bytes(16), bytes(15) + b"\1"]) == 403
    assert registry.tenant("alice").grants[0].features == 0


def test_more_requests_than_the_quota_wait_as_long_as_they_are_told(gate, registry, clock, alice):
    registry.set_rate("alice", 30)
    assert [status(gate, alice) for _ in range(31)] == [200] * 30 + [429]
    with pytest.raises(Refused) as refused:
        gate.admit(alice, task="smile", verb="read")
    assert refused.value.retry_after == pytest.approx(2.0)
    clock.now += refused.value.retry_after - 0.01
    assert status(gate, alice) == 429
    clock.now += 0.01
    assert status(gate, alice) == 200
    assert status(gate, alice) == 429
    clock.now += 1000
    assert [status(gate, alice) for _ in range(31)] == [200] * 30 + [429], "no more is saved up than a minute's worth"


def test_looking_for_tasks_counts_as_asking(gate, registry, alice):
    registry.set_rate("alice", 3)
    assert [status(gate, alice, task=f"guess{i}") for i in range(4)] == [404, 404, 404, 429]


def test_the_quota_of_requests_is_over_all_tokens_and_not_shared_with_others(gate, registry, alice):
    registry.set_rate("alice", 2)
    bob = registry.add("bob", "tenant", requests_per_minute=2)
    registry.grant("bob", "smile")
    second = header(registry.rotate("alice", grace_s=100))
    assert [status(gate, one) for one in (alice, second, alice, second)] == [200, 200, 429, 429]
    assert status(gate, header(bob)) == 200


# -- several threads and processes -------------------------------------------------------------------------------------


def _ask_often(path: Path, authorization: str, times: int, answers) -> None:
    gate = Gate(path)
    let_out = 0
    for number in range(times):
        digest = (os.getpid() * 1000 + number).to_bytes(16, "big")
        let_out += charge(gate, authorization, 1, bits=BITS, digests=[digest]) == 200
    answers.put(let_out)


def test_processes_that_race_never_let_out_more_than_the_quota(tmp_path):
    with Registry(tmp_path / "tenants.db") as registry:
        alice = header(registry.add("alice", "tenant"))
        registry.grant("alice", "smile")
        registry.set_features("alice", "smile", 17)
    with BitLedger(tmp_path / "tenants-bits.db") as bits:
        bits.set_limit("alice", "smile", 1e6)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_ask_often, args=(tmp_path / "tenants.db", alice, 10, answers)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    let_out = sum(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert let_out == 17
    with Registry(tmp_path / "tenants.db") as registry, AuditLog(tmp_path / "tenants-audit.db") as audit:
        assert registry.tenant("alice").grants[0].features == 17
        assert audit.verify().lines == 30 - 17


def test_threads_that_race_never_let_out_more_than_the_quotas(gate, registry, alice):
    registry.set_features("alice", "smile", 33)
    registry.set_rate("alice", 50)
    outcomes: list[int] = []

    def ask() -> None:
        outcomes.extend(charge(gate, alice, 1) for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {code: outcomes.count(code) for code in set(outcomes)} == {200: 33, 403: 17, 429: 30}
    assert registry.tenant("alice").grants[0].features == 33


def test_a_gate_travels_as_its_path_and_is_not_used_by_two_processes(gate, alice, monkeypatch):
    copy = pickle.loads(pickle.dumps(gate))
    assert copy.places == gate.places
    copy.close()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(LedgerError, match="another process"):
        gate.admit(alice, task="smile", verb="read")


def test_a_registry_that_cannot_be_read_lets_nobody_in(gate, alice):
    gate._reader.close()
    with pytest.raises(LedgerError):
        gate.admit(alice, task="smile", verb="read")


# -- what is written down ----------------------------------------------------------------------------------------------


def test_refusals_are_written_down_with_who_asked_and_admissions_as_they_come_out(gate, registry, alice):
    assert status(gate, alice, task="pose") == 404
    assert status(gate, None) == 401
    registry.set_features("alice", "smile", 0)
    assert charge(gate, alice) == 403
    admission = gate.admit(alice, task="smile", verb="read")
    gate.audit(admission, task="smile", verb="read", outcome=200, detail="features 3 to 7")
    with AuditLog(gate.places.audit) as audit:
        told = [(line.tenant, line.task, line.verb, line.outcome) for line in audit.lines()]
        assert audit.verify().lines == 4
        assert {line.token for line in audit.lines()} == {"", admission.token}
        assert audit.lines()[-1].detail == "features 3 to 7"
    assert told == [
        ("alice", "pose", "read", 404),
        ("", "smile", "read", 401),
        ("alice", "smile", "read", 403),
        ("alice", "smile", "read", 200),
    ]


def test_a_decision_writes_nothing_and_its_denial_is_one_line_once_it_is_written_down(gate, registry, alice):
    registry.set_features("alice", "smile", 0)
    asked = [(None, "smile", 0, 401), (alice, "pose", 0, 404), (alice, "smile", 1, 403)]
    denials = [gate.decide(header, task=task, verb="read", features=n) for header, task, n, _ in asked]
    with AuditLog(gate.places.audit) as audit:
        assert audit.lines() == []
        assert [gate.write_down(denial).status for denial in denials] == [wanted for *_, wanted in asked]
        assert [line.outcome for line in audit.lines()] == [401, 404, 403]
    assert gate.decide(alice, task="smile", verb="read") == gate.admit(alice, task="smile", verb="read")
    assert alice[-43:] not in repr(denials)


def test_no_secret_reaches_the_files_or_a_repr(gate, registry, alice):
    token = alice.removeprefix("Bearer ")
    secret = token[20:]
    admission = gate.admit(alice, task="smile", verb="read")
    status(gate, alice + "x")
    status(gate, f"Bearer {token}", task=secret[:10])
    gate.close()
    for file in gate.places.registry.parent.iterdir():
        assert secret.encode() not in file.read_bytes(), file
        assert file.stat().st_mode & 0o777 == 0o600, file
    assert secret not in repr(admission) + repr(gate)
    gate.__init__(gate.places.registry)


def test_whoever_asks_in_vain_cannot_fill_the_disk(gate, clock, alice):
    for _ in range(1000):
        status(gate, None)
    with AuditLog(gate.places.audit) as audit:
        assert audit.head().lines == 600
        assert status(gate, alice, task="pose") == 404
        assert audit.head().lines == 601, "others are written down all the same"
        clock.now += 1
        status(gate, None)
        assert audit.lines()[-1].detail == "400 more refusals before it"
