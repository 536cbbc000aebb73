"""Counts of several replicas, added up."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from serve.ports import NoMeter
from serve.traffic import SLOT_S, SLOTS, Counts, Meters, TrafficMeter, read_traffic

NOW = 1_800_000_000.0
LOOP = ("loop", "read")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meters(tmp_path, clock):
    """Two replicas."""
    opened = [TrafficMeter(tmp_path, clock=clock) for _ in range(2)]
    yield opened
    for meter in opened:
        meter.close()


def ask(meter, n=1, *, task="loop", verb="read", status=200, seconds=0.01):
    for _ in range(n):
        meter.request(tenant="alice", task=task, verb=verb, status=status, seconds=seconds)


def flushed(meters, folder, clock):
    for meter in meters:
        meter.flush()
    return read_traffic(folder, clock=clock)


def test_what_every_replica_counted_is_added_up(meters, tmp_path, clock):
    ask(meters[0], 30)
    ask(meters[1], 12)
    ask(meters[1], 6, task="parity", verb="publish")
    ask(meters[0], 3, status=404)
    ask(meters[0], 2, status=503)
    clock.now += SLOT_S
    traffic = flushed(meters, tmp_path, clock)
    assert traffic.asked() == [LOOP, ("parity", "publish")]
    counts = traffic.over(LOOP, 1)
    assert (counts.answered, counts.refused, counts.failed, counts.total) == (42, 3, 2, 47)
    assert traffic.per_minute(LOOP, 1) == 47
    assert traffic.per_minute(LOOP, 15) == pytest.approx(47 / 15)


def test_a_slot_counts_once_it_is_over_and_until_it_is_old(meters, tmp_path, clock):
    ask(meters[0], 5)
    assert flushed(meters, tmp_path, clock).over(LOOP, 15).total == 0
    clock.now += SLOT_S
    assert read_traffic(tmp_path, clock=clock).over(LOOP, 1).total == 5
    assert read_traffic(tmp_path, clock=clock).history(LOOP)[-1] == 5
    clock.now += 60
    assert read_traffic(tmp_path, clock=clock).over(LOOP, 1).total == 0
    assert read_traffic(tmp_path, clock=clock).over(LOOP, 15).total == 5
    clock.now += SLOT_S * SLOTS
    assert read_traffic(tmp_path, clock=clock).asked() == []


def test_a_file_does_not_grow_with_time(meters, tmp_path, clock):
    sizes = []
    for _ in range(3 * SLOTS):
        ask(meters[0])
        meters[0].flush()
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.json")))
        clock.now += SLOT_S
    assert sizes[-1] <= max(sizes[:SLOTS]) * 1.05


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_a_quantile_is_right_to_an_eighth(q):
    random.seed(0)
    seconds = [random.lognormvariate(-4.5, 1.0) for _ in range(20_000)]
    counts = Counts()
    for value in seconds:
        counts.count(200, value)
    assert counts.quantile(q) == pytest.approx(float(np.quantile(seconds, q)), rel=0.125)


def test_a_quantile_of_nothing_is_none_and_of_what_is_too_slow_the_last_edge():
    assert Counts().quantile(0.5) is None
    counts = Counts()
    counts.count(200, 1e6)
    assert 60 < counts.quantile(0.5) < 80


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "slots": []}', '{"format": 1, "slots": [[1, "a"]]}'])
def test_a_file_that_is_none_is_left_out_and_logged(meters, tmp_path, clock, caplog, text):
    (tmp_path / "broken.json").write_text(text)
    ask(meters[0], 4)
    clock.now += SLOT_S
    assert flushed(meters, tmp_path, clock).over(LOOP, 1).total == 4
    assert "broken.json" in caplog.text


def test_what_is_written_names_no_tenant(meters, tmp_path):
    ask(meters[0])
    meters[0].flush()
    (path,) = tmp_path.glob("*.json")
    assert "alice" not in path.read_text()
    assert json.loads(path.read_text())["slots"][0][1:3] == ["loop", "read"]


def test_files_that_nobody_writes_any_more_are_removed(tmp_path, clock):
    old, new = tmp_path / "1-a.json", tmp_path / "2-b.json"
    for path in (old, new):
        path.write_text("{}")
    os.utime(old, (NOW - 4000, NOW - 4000))
    os.utime(new, (NOW - 100, NOW - 100))
    TrafficMeter(tmp_path, clock=clock).close()
    assert not old.exists()
    assert new.exists()


def test_a_disk_that_cannot_be_written_stops_nothing(tmp_path, clock, caplog):
    (tmp_path / "file").write_text("")
    meter = TrafficMeter(tmp_path / "file" / "below", clock=clock)
    ask(meter)
    meter.flush()
    ask(meter)
    meter.flush()
    meter.close()
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_a_replica_that_is_killed_loses_no_more_than_the_last_seconds(tmp_path):
    program = (
        "import sys, time, pathlib; from serve.traffic import TrafficMeter\n"
        "meter = TrafficMeter(pathlib.Path(sys.argv[1]))\n"
        "for _ in range(50): meter.request(tenant='', task='loop', verb='read', status=200, seconds=0.01)\n"
        "print('asked', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "asked\n"
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    traffic = read_traffic(tmp_path, clock=lambda: time.time() + SLOT_S)
    assert traffic.over(LOOP, 15).total == 50


def test_several_meters_are_told_the_same(meters, tmp_path, clock):
    both = Meters(NoMeter(), meters[0], meters[1])
    ask(both, 3)
    both.released(tenant="alice", task="loop", version="1", features=1, size_bytes=10)
    clock.now += SLOT_S
    assert flushed(meters, tmp_path, clock).over(LOOP, 1).total == 6
