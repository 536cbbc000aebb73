"""The ledger: never under-counted, never overspent, whoever dies and however many race for it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.errors import BudgetExceededError, LedgerError, UnknownNameError
from orchestrator.privacy.accounting import epsilon_of
from orchestrator.privacy.ledger import Ledger, LedgerCharge, Mechanism

SMALL = Mechanism(noise_multiplier=1.0, sample_rate=0.01, steps=100)
DELTA = 1e-5
ONE = epsilon_of(
    noise_multiplier=SMALL.noise_multiplier, delta=DELTA, sample_rate=0.01, steps=SMALL.steps, accountant="rdp"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def reserve(ledger: Ledger, run: str, mechanism: Mechanism = SMALL, *, secret: int = 1, images: str = "a" * 64) -> int:
    return ledger.reserve(images, "faces", mechanism, run=run, part="encoder", mode="whole", delta=DELTA, secret=secret)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "once", "twice"),
    [(0.7056, 1 / 281, 5620, 1e-5, 4.0, 5.27), (0.5518, 1 / 2532, 25320, 1e-6, 4.0, 4.44)],
    ids=["StateFarm", "CelebA"],
)
def test_two_equal_trainings_compose_to_what_renyi_dp_says(path, sigma, rate, steps, delta, once, twice):
    with Ledger(path) as ledger:
        for run, expected in (("first", once), ("second", twice)):
            mechanism = Mechanism(noise_multiplier=sigma, sample_rate=rate, steps=steps)
            number = reserve(ledger, run, mechanism)
            ledger.charge(number, steps)
            assert ledger.account("faces").spent(delta) == pytest.approx(expected, abs=0.01)


def test_every_charge_counts_and_nothing_is_spent_before_one(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r")
        assert ledger.account("faces").spent(DELTA) == 0
        assert ledger.account("faces").committed(DELTA) == pytest.approx(ONE)
        charge = LedgerCharge(path, number)
        seen = [0.0]
        for step in range(1, 11):
            charge(step)
            seen.append(ledger.account("faces").spent(DELTA))
        assert all(a < b for a, b in pairwise(seen))
        assert ledger.account("faces").entries[0].charged == 10


def test_the_same_step_again_is_free_and_a_gap_charges_all_up_to_it(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r")
        for step, charged in ((1, 1), (1, 1), (5, 5), (2, 5)):
            ledger.charge(number, step)
            assert ledger.account("faces").entries[0].charged == charged


def test_a_step_beyond_the_reservation_is_not_taken(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r")
        with pytest.raises(LedgerError, match="step 101 was not reserved"):
            ledger.charge(number, SMALL.steps + 1)
        with pytest.raises(LedgerError, match="no reservation 77"):
            ledger.charge(77, 1)


def test_a_training_that_would_pass_the_limit_is_refused_and_changes_nothing(path):
    with Ledger(path) as ledger:
        ledger.set_limit("a" * 64, "faces", epsilon=ONE + 0.01, delta=DELTA)
        reserve(ledger, "first")
        with pytest.raises(BudgetExceededError, match="Nothing was trained"):
            reserve(ledger, "second")
        assert [e.run for e in ledger.account("faces").entries] == ["first"]
        reserve(ledger, "another data set", images="b" * 64)


def test_what_is_released_is_free_again_but_not_what_was_charged(path):
    with Ledger(path) as ledger:
        ledger.set_limit("a" * 64, "faces", epsilon=ONE + 0.01, delta=DELTA)
        first = reserve(ledger, "first")
        ledger.charge(first, 60)
        ledger.release(first)
        with pytest.raises(LedgerError, match="was released"):
            ledger.charge(first, 61)
        with pytest.raises(BudgetExceededError):
            reserve(ledger, "second")
        reserve(ledger, "shorter", Mechanism(noise_multiplier=1.0, sample_rate=0.01, steps=40))


def test_a_resumed_training_takes_up_its_reservation_and_another_secret_does_not(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r", secret=5)
        assert reserve(ledger, "r", secret=5) == number
        assert reserve(ledger, "r", secret=6) != number
        with pytest.raises(LedgerError, match="for another training"):
            reserve(ledger, "r", Mechanism(noise_multiplier=2.0, sample_rate=0.01, steps=100), secret=5)


def test_the_secret_itself_is_not_in_the_file(path):
    secret = 0x1234567890ABCDEF
    with Ledger(path) as ledger:
        reserve(ledger, "r", secret=secret)
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert str(secret).encode() not in content
    assert secret.to_bytes(8, "big") not in content
    assert path.stat().st_mode & 0o077 == 0


def test_nobody_can_take_back_what_was_spent(path):
    with Ledger(path) as ledger:
        ledger.charge(reserve(ledger, "r"), 50)
    raw = sqlite3.connect(path)
    for statement in (
        "UPDATE reservations SET charged = 3",
        "UPDATE reservations SET noise_multiplier = 99.0",
        "DELETE FROM reservations",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="cannot be taken back"):
            raw.execute(statement)
    raw.close()


def _race(path: Path, run: str, barrier: object, results: object) -> None:
    with Ledger(path) as ledger:
        barrier.wait()
        try:
            number = reserve(ledger, run)
        except BudgetExceededError:
            results.put((run, "refused"))
            return
        for step in range(1, 6):
            ledger.charge(number, step)
        results.put((run, "ran"))


def test_of_ten_processes_that_race_for_room_for_three_exactly_three_run(path):
    three = epsilon_of(noise_multiplier=1.0, delta=DELTA, sample_rate=0.01, steps=3 * SMALL.steps, accountant="rdp")
    with Ledger(path) as ledger:
        ledger.set_limit("a" * 64, "faces", epsilon=three + 1e-6, delta=DELTA)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(10), context.Queue()
    jobs = [context.Process(target=_race, args=(path, f"job{i}", barrier, results)) for i in range(10)]
    for job in jobs:
        job.start()
    outcomes = [results.get(timeout=120)[1] for _ in jobs]
    for job in jobs:
        job.join(timeout=60)
    assert sorted(outcomes) == ["ran"] * 3 + ["refused"] * 7
    with Ledger(path) as ledger:
        account = ledger.account("faces")
        assert [e.charged for e in account.entries] == [5, 5, 5]
        assert account.committed(DELTA) <= three + 1e-6


def test_processes_that_begin_the_same_new_ledger_at_once_all_get_it(path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(6), context.Queue()
    jobs = [context.Process(target=_race, args=(path, f"job{i}", barrier, results)) for i in range(6)]
    for job in jobs:
        job.start()
    assert {results.get(timeout=120)[1] for _ in jobs} == {"ran"}
    for job in jobs:
        job.join(timeout=60)


def _charge_until_killed(path: Path, number: int, told: object) -> None:
    charge = LedgerCharge(path, number)
    for step in range(1, SMALL.steps + 1):
        charge(step)
        told.value = step


def test_a_killed_training_keeps_what_it_spent(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r")
    context = multiprocessing.get_context("spawn")
    told = context.Value("i", 0)
    job = context.Process(target=_charge_until_killed, args=(path, number, told))
    job.start()
    while told.value < 5:
        pass
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    with Ledger(path) as ledger:
        entry = ledger.account("faces").entries[0]
    assert told.value <= entry.charged <= told.value + 1
    assert entry.held == SMALL.steps, "the rest stays reserved: the training may be resumed"


def test_a_charge_travels_to_another_process(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r")
        charge = LedgerCharge(path, number)
        charge(1)
        pickle.loads(pickle.dumps(charge))(2)
        assert ledger.account("faces").entries[0].charged == 2


def test_a_charge_that_cannot_be_written_raises(path):
    with Ledger(path) as ledger:
        number = reserve(ledger, "r")
        ledger._db.execute("PRAGMA query_only = ON")
        with pytest.raises(LedgerError, match="cannot write"):
            ledger.charge(number, 1)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 100, None])
def test_a_file_that_is_no_ledger_is_refused(path, content):
    if content is None:
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE t (x)")
        other.close()
    else:
        path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"no privacy ledger|not a database"):
        Ledger(path)


def test_a_ledger_of_another_version_is_refused(path):
    Ledger(path).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 9")
    raw.close()
    with pytest.raises(LedgerError, match="version 9"):
        Ledger(path)


def test_what_no_accountant_covers_is_listed_once(path):
    with Ledger(path) as ledger:
        for _ in range(2):
            ledger.note_outside("a" * 64, "faces", run="r", what="heads: trained without noise")
        account = ledger.account("aaaa")
    assert [what for _, _, what in account.outside] == ["heads: trained without noise"]
    assert account.to_json()["outside_the_accounting"][0]["what"] == "heads: trained without noise"


def test_an_unknown_data_set_lists_the_known_ones(path):
    with Ledger(path) as ledger:
        reserve(ledger, "r")
        with pytest.raises(UnknownNameError, match="faces"):
            ledger.account("digits")
