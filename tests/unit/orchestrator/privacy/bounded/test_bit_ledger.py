"""The ledger of bits: never under-counted, never overspent, and the same feature never charged twice."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
import sqlite3
import threading
from pathlib import Path

import pytest

from orchestrator.errors import BitBudgetExceededError, ConfigError, LedgerError, NonFiniteFeatureError, PrivacyRefusal
from orchestrator.privacy.bounded.bit_ledger import BitLedger

BITS = 4 * math.log2(5)
"""Of d = 8 and tau = .5. Written out, as the processes below need not wait for torch."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bits.db"


def digests(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def keyed(ledger: BitLedger, *numbers: int, task: str = "smile", version: str = "1", tenant: str = "t") -> float:
    return ledger.charge(tenant, task, version, digests(*numbers), BITS, fresh=False)


def fresh(ledger: BitLedger, *numbers: int) -> float:
    return ledger.charge("t", "smile", "1", digests(*numbers), BITS, fresh=True)


def test_every_image_counts_once(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 1000)
        assert keyed(ledger, 1, 2, 3) == 3 * BITS
        assert ledger.spent("t", "smile") == 3 * BITS
        assert keyed(ledger, 2, 3, 4, 4, 4) == BITS
        assert keyed(ledger, 4, 1) == 0
        assert keyed(ledger) == 0
        assert ledger.spent("t", "smile") == 4 * BITS


def test_with_fresh_noise_every_release_counts(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 1000)
        assert fresh(ledger, 1, 1, 1) == 3 * BITS
        assert fresh(ledger, 1) == BITS
        assert keyed(ledger, 1) == BITS, "a fresh release does not make the keyed one free: it is another draw"
        assert fresh(ledger, 1) == BITS, "and not the other way round"
        assert ledger.spent("t", "smile") == 5 * BITS + BITS


def test_tenants_tasks_and_versions_are_counted_apart(path):
    with BitLedger(path) as ledger:
        for tenant, task in (("t", "smile"), ("t", "age"), ("u", "smile")):
            ledger.set_limit(tenant, task, 1000)
        keyed(ledger, 1)
        assert keyed(ledger, 1, task="age") == BITS
        assert keyed(ledger, 1, tenant="u") == BITS
        assert keyed(ledger, 1, version="2") == BITS, "a new version tells more of the same image"
        assert ledger.spent("t", "smile") == 2 * BITS
        assert ledger.spent("nobody", "smile") == 0


def test_counting_does_not_drift(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", math.inf)
        for start in range(0, 20_000, 1000):
            ledger.charge("t", "smile", "1", digests(*range(start, start + 1000)), 0.1, fresh=False)
        assert ledger.spent("t", "smile") == 2000.0


def test_what_passes_the_limit_is_refused_as_a_whole_and_leaves_nothing_charged(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 3 * BITS)
        keyed(ledger, 1)
        before = ledger.summary()
        with pytest.raises(BitBudgetExceededError) as refused:
            keyed(ledger, 1, 2, 3, 4)
        assert (refused.value.asked_bits, refused.value.left_bits) == (3 * BITS, pytest.approx(2 * BITS))
        with pytest.raises(BitBudgetExceededError):
            fresh(ledger, 1, 2, 3)
        assert ledger.summary() == before
        assert keyed(ledger, 2, 3) == 2 * BITS, "none of the refused images was noted as released"
        assert keyed(ledger, 1, 2, 3) == 0, "with nothing left, repetitions are still free"
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, 1, 4)
    assert isinstance(refused.value, PrivacyRefusal)
    for part in ("'t'", "'smile'", "27.8", "18.5", "nothing was released"):
        assert part in str(refused.value)


@pytest.mark.parametrize("n", [1, 3, 7, 100, 3333])
def test_a_limit_of_n_features_has_room_for_n_and_no_more(path, n):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", n * BITS)
        for number in range(n) if n < 10 else ():
            keyed(ledger, number)
        keyed(ledger, *range(n))
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, n)


def test_room_is_looked_for_before_the_first_of_many_parts(path):
    """What was charged of them counts, what was charged of another version is in their way, and nothing is kept."""
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 5 * BITS)
        ledger.check_room("t", "smile", "1", 5, BITS)
        with pytest.raises(BitBudgetExceededError) as refused:
            ledger.check_room("t", "smile", "1", 6, BITS)
        assert refused.value.asked_bits == 6 * BITS
        keyed(ledger, 1, 2, 3)
        ledger.check_room("t", "smile", "1", 5, BITS)
        with pytest.raises(BitBudgetExceededError) as refused:
            ledger.check_room("t", "smile", "2", 3, BITS)
        assert refused.value.left_bits == pytest.approx(2 * BITS)
        ledger.check_room("t", "smile", "2", 0, BITS)
        assert ledger.spent("t", "smile") == 3 * BITS


def test_rounding_takes_no_room_away(path):
    """3 * 0.1 is above 0.3 in floating point."""
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 0.3)
        ledger.charge("t", "smile", "1", digests(1, 2, 3), 0.1, fresh=False)
        with pytest.raises(BitBudgetExceededError):
            ledger.charge("t", "smile", "1", digests(4), 0.1, fresh=False)


def test_without_a_limit_nothing_is_released_and_an_infinite_one_only_counts(path):
    with BitLedger(path) as ledger:
        with pytest.raises(BitBudgetExceededError, match="has no limit of bits"):
            keyed(ledger, 1)
        assert ledger.summary() == []
        ledger.set_limit("t", "smile", math.inf)
        keyed(ledger, *range(1000))
        account = ledger.account("t", "smile").to_json()
        assert (account["limit_bits"], account["bits_left"]) == ("none", None)


def test_a_limit_may_be_lowered_below_what_is_spent_and_then_nothing_is_left(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 3 * BITS)
        keyed(ledger, 1, 2)
        assert ledger.set_limit("t", "smile", BITS).left_bits == 0
        assert keyed(ledger, 1, 2) == 0, "what was released tells nothing new"
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, 3)
        ledger.set_limit("t", "smile", 3 * BITS)
        keyed(ledger, 3)
        assert ledger.spent("t", "smile") == 3 * BITS


def test_a_version_whose_channel_changed_is_refused(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 1000)
        keyed(ledger, 1)
        with pytest.raises(LedgerError, match="another version"):
            ledger.charge("t", "smile", "1", digests(2), 2 * BITS, fresh=False)
        with pytest.raises(LedgerError, match="another version"):
            ledger.charge("t", "smile", "1", digests(1), BITS / 1000, fresh=False)
        assert ledger.spent("t", "smile") == BITS


@pytest.mark.parametrize("bits", [0.0, -1.0, math.nan, math.inf])
def test_a_release_has_a_number_of_bits(path, bits):
    with BitLedger(path) as ledger, pytest.raises(ConfigError, match="bits of a release"):
        ledger.charge("t", "smile", "1", digests(1), bits, fresh=True)


def test_limits_below_zero_and_wrong_digests_are_refused(path):
    with BitLedger(path) as ledger:
        for bits in (-1.0, math.nan):
            with pytest.raises(ConfigError, match="limit"):
                ledger.set_limit("t", "smile", bits)
        with pytest.raises(ConfigError, match="16 bytes"):
            ledger.charge("t", "smile", "1", [bytes(32)], BITS, fresh=False)


def test_a_limit_of_zero_lets_nothing_out(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 0)
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, 1)


def test_the_summary_has_every_pair_and_is_json(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("u", "age", 50)
        ledger.set_limit("t", "smile", 1000)
        keyed(ledger, 1, 2)
        fresh(ledger, 3)
        accounts = json.loads(json.dumps([account.to_json() for account in ledger.summary()]))
    assert [(a["tenant"], a["task"], a["bits_spent"]) for a in accounts] == [
        ("t", "smile", 3 * BITS),
        ("u", "age", 0.0),
    ]
    assert [(v["noise"], v["releases"]) for v in accounts[0]["versions"]] == [("keyed", 2), ("fresh", 1)]
    assert accounts[1]["bits_left"] == 50


def test_nobody_can_take_back_what_was_released(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 1000)
        keyed(ledger, 1, 2)
    raw = sqlite3.connect(path)
    for statement in (
        "UPDATE spending SET releases = 1",
        "UPDATE spending SET bits_per_release = 0.1",
        "UPDATE spending SET tenant = 'somebody else'",
        "DELETE FROM spending",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="cannot be taken back"):
            raw.execute(statement)
    raw.close()


def test_the_file_is_for_its_owner_alone(path):
    BitLedger(path).close()
    assert path.stat().st_mode & 0o077 == 0


def _race(path: Path, number: int, barrier: object, results: object) -> None:
    with BitLedger(path) as ledger:
        barrier.wait()
        try:
            keyed(ledger, number)
        except BitBudgetExceededError:
            results.put("refused")
        except LedgerError as error:
            results.put(str(error))
        else:
            results.put("released")


@pytest.mark.parametrize("existing", [True, False], ids=["one ledger", "a new ledger"])
def test_of_eight_processes_that_race_for_room_for_three_exactly_three_release(path, existing):
    if existing:
        with BitLedger(path) as ledger:
            ledger.set_limit("t", "smile", 3 * BITS)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(8), context.Queue()
    jobs = [context.Process(target=_race, args=(path, number, barrier, results)) for number in range(8)]
    for job in jobs:
        job.start()
    outcomes = sorted(results.get(timeout=120) for _ in jobs)
    for job in jobs:
        job.join(timeout=60)
    assert outcomes == (["refused"] * 5 + ["released"] * 3 if existing else ["refused"] * 8)
    with BitLedger(path) as ledger:
        assert ledger.spent("t", "smile") == (3 * BITS if existing else 0)


def test_of_sixteen_threads_with_one_ledger_exactly_three_release(path):
    outcomes = []
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 3 * BITS)
        barrier = threading.Barrier(16)

        def work(number: int) -> None:
            barrier.wait()
            try:
                outcomes.append(keyed(ledger, number))
            except BitBudgetExceededError:
                outcomes.append(None)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes, key=str) == [BITS] * 3 + [None] * 13
        assert ledger.spent("t", "smile") == 3 * BITS


def _charge_until_killed(path: Path, told: object) -> None:
    with BitLedger(path) as ledger:
        for number in range(100_000):
            keyed(ledger, number)
            told.value = number + 1


def test_what_was_charged_before_a_process_was_killed_stays(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", math.inf)
    context = multiprocessing.get_context("spawn")
    told = context.Value("i", 0)
    job = context.Process(target=_charge_until_killed, args=(path, told))
    job.start()
    while told.value < 5:
        pass
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    with BitLedger(path) as ledger:
        released = ledger.account("t", "smile").spending[0].releases
        assert told.value <= released <= told.value + 1
        assert keyed(ledger, *range(released)) == 0


def test_a_charge_that_cannot_be_written_raises(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 1000)
        ledger._db.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerError, match="cannot write"):
            keyed(ledger, 1)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 100, None])
def test_a_file_that_is_no_ledger_is_refused(path, content):
    if content is None:
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE t (x)")
        other.close()
    else:
        path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"no ledger of bits|not a database"):
        BitLedger(path)


def test_a_ledger_of_another_version_or_in_no_folder_is_refused(path):
    BitLedger(path).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 9")
    raw.close()
    with pytest.raises(LedgerError, match="version 9"):
        BitLedger(path)
    with pytest.raises(LedgerError, match="cannot open"):
        BitLedger(path / "ledger.db")


@pytest.mark.parametrize(
    "error",
    [
        BitBudgetExceededError("t", "smile", 9.3, 1.0, 20.0),
        BitBudgetExceededError("t", "smile", 9.3, 0.0, None),
        NonFiniteFeatureError("NaN"),
    ],
    ids=str,
)
def test_the_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_what_was_released_before_is_free_without_waiting_for_the_one_who_writes(path):
    with BitLedger(path) as ledger, BitLedger(path) as other:
        ledger.set_limit("t", "smile", 2 * BITS)
        keyed(ledger, 1, 2)
        ledger.set_limit("t", "smile", 0)
        with other._transaction():
            assert keyed(ledger, 1, 2, 1) == 0
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, 1, 2, 3)
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, 1, version="2")
        with pytest.raises(BitBudgetExceededError):
            keyed(ledger, 1, tenant="other")
        with pytest.raises(LedgerError, match="never changes"):
            ledger.charge("t", "smile", "1", digests(1), BITS / 2, fresh=False)
        with pytest.raises(BitBudgetExceededError):
            fresh(ledger, 1)
        assert ledger.spent("t", "smile") == 2 * BITS


def test_what_was_spent_is_not_replaced(path):
    with BitLedger(path) as ledger:
        ledger.set_limit("t", "smile", 9 * BITS)
        keyed(ledger, 1, 2)
        with pytest.raises(LedgerError, match="cannot be taken back"), ledger._transaction() as db:
            db.execute(
                "REPLACE INTO spending (tenant, task, version, fresh, bits_per_release, releases) "
                "VALUES ('t', 'smile', '1', 0, ?, 0)",
                (BITS,),
            )
        assert ledger.spent("t", "smile") == 2 * BITS
