"""Buckets of requests: against a bucket that is counted in fractions, and between processes."""

from __future__ import annotations

import math
import multiprocessing
import struct
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import LedgerError
from serve.tenants.rates import RateFile


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(tmp_path: Path, clock: Clock):
    rates = RateFile(tmp_path / "registry.rates", clock=clock)
    yield rates
    rates.close()


@settings(deadline=None, max_examples=100)
@given(
    per_minute=st.sampled_from([1, 2, 3, 6, 15, 60, 240]),
    eighths=st.lists(st.integers(0, 8 * 90) | st.integers(0, 16), max_size=60),
)
def test_it_lets_through_what_a_bucket_that_is_counted_exactly_lets_through(tmp_path_factory, per_minute, eighths):
    clock = Clock()
    rates = RateFile(tmp_path_factory.mktemp("rates") / "r", clock=clock)
    level = Fraction(per_minute)
    for step in eighths:  # of a second: exact in binary
        clock.now += step / 8
        level = min(Fraction(per_minute), level + Fraction(step, 8) * per_minute / 60)
        wait = rates.take(2, per_minute)
        assert (wait is None) == (level >= 1)
        if wait is None:
            level -= 1
        else:
            assert wait == pytest.approx(float((1 - level) * 60 / per_minute))
    rates.close()


def test_buckets_are_apart(rates):
    assert [rates.take(5, 2) for _ in range(2)] == [None, None]
    assert rates.take(5, 2) is not None
    assert rates.take(4, 2) is rates.take(6, 2) is rates.take(100_000, 2) is None


def test_a_file_from_before_a_reboot_is_full_buckets(rates, clock):
    assert [rates.take(1, 1), rates.take(1, 1) is None] == [None, False]
    clock.now = 3.0
    assert rates.take(1, 1) is None
    assert rates.take(1, 1) == pytest.approx(60)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1.0])
def test_a_time_that_cannot_be_neither_opens_nor_shuts_a_bucket_for_good(rates, tmp_path, value):
    (tmp_path / "registry.rates").write_bytes(struct.pack("<d", value))
    assert rates.take(0, 1) is None
    assert rates.take(0, 1) == pytest.approx(60)


def test_a_file_that_was_cut_off_is_full_buckets(rates, tmp_path):
    assert rates.take(7, 1) is None
    with (tmp_path / "registry.rates").open("r+b") as file:
        file.truncate(60)  # in the middle of it
    assert rates.take(7, 1) is None


def test_who_opens_the_file_again_finds_the_buckets_as_they_were(rates, tmp_path, clock):
    rates.take(3, 1)
    again = RateFile(tmp_path / "registry.rates", clock=clock)
    assert again.take(3, 1) == pytest.approx(60)
    again.close()
    assert (tmp_path / "registry.rates").stat().st_mode & 0o777 == 0o600


_CAPACITY = 15_360  # 60 / 15360 is 2^-8: the sum is exact


def _take(path: Path, times: int, together, taken) -> None:
    rates = RateFile(path, clock=lambda: 1024.0)
    together.wait(timeout=60)
    taken.put(sum(rates.take(1, _CAPACITY) is None for _ in range(times)))


def test_processes_that_race_take_no_request_twice(tmp_path):
    context = multiprocessing.get_context("spawn")
    taken, together = context.Queue(), context.Barrier(3)
    processes = [context.Process(target=_take, args=(tmp_path / "r", 12_000, together, taken)) for _ in range(3)]
    for process in processes:
        process.start()
    total = sum(taken.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert total == _CAPACITY


def test_a_file_that_cannot_be_opened_is_said_in_one_line(tmp_path):
    with pytest.raises(LedgerError, match="cannot open the file of request rates"):
        RateFile(tmp_path)
