"""What was published is read in order, once, and kept as long as it should be."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import ConfigError, LedgerError
from serve.streams import FeatureStore, NewFeature, RingLimits, VersionTerms


@pytest.fixture
def now() -> list[float]:
    return [1_700_000_000.0]


@pytest.fixture
def store(tmp_path, now):
    with FeatureStore(tmp_path / "loop.db", clock=lambda: now[0]) as opened:
        yield opened


def put(store: FeatureStore, *values: float, version: str = "1.1-a") -> list[int]:
    new = [
        NewFeature(version=version, image=b"image %d" % int(value), z=np.full((2, 1, 1), value, np.float32))
        for value in values
    ]
    return [feature.sequence for feature in store.append(new)]


def test_features_come_back_in_order_after_a_number(store, now):
    assert put(store, 1, 2, 3) == [1, 2, 3]
    now[0] += 1.5
    assert put(store, 4) == [4]
    found = store.after(1, limit=2)
    assert [f.sequence for f in found] == [2, 3]
    np.testing.assert_array_equal(found[0].z, np.full((2, 1, 1), 2, np.float32))
    assert store.after(3, limit=9)[0].time_ms == 1_700_000_001_500
    assert store.after(4, limit=9) == []
    assert store.latest().sequence == 4
    assert store.bounds() == (1, 4)


def test_a_stream_that_has_not_begun_is_empty(store):
    assert store.latest() is None and store.after(0, limit=9) == [] and store.bounds() == (1, 0)


def test_features_of_two_versions_are_never_read_together(store):
    put(store, 1, 2)
    put(store, 3, version="2.1-b")
    put(store, 4)
    assert [f.sequence for f in store.after(0, limit=9)] == [1, 2]
    assert [f.sequence for f in store.after(2, limit=9)] == [3]
    assert [f.sequence for f in store.after(0, limit=9, version="1.1-a")] == [1, 2, 4]
    assert store.latest("2.1-b").sequence == 3 and store.latest("3.1-c") is None


def test_what_is_published_together_is_there_in_its_order_or_not_at_all(store):
    new = [
        NewFeature(version=version, image=b"image %d" % value, z=np.full((2, 1, 1), value, np.float32))
        for value, version in ((1, "1.1-a"), (2, "2.1-b"), (3, "1.1-a"))
    ]
    stored = store.append(new)
    assert [(f.sequence, f.version) for f in stored] == [(1, "1.1-a"), (2, "2.1-b"), (3, "1.1-a")]
    for feature in stored:
        read = store.after(feature.sequence - 1, limit=1)[0]
        assert (read.time_ms, read.version, read.image) == (feature.time_ms, feature.version, feature.image)
        np.testing.assert_array_equal(read.z, feature.z)
    with pytest.raises(LedgerError):
        store.append([new[0], NewFeature(version=None, image=b"", z=new[0].z)])
    assert store.bounds() == (1, 3)


def test_an_image_is_found_again_under_its_version_alone(store):
    put(store, 7)
    np.testing.assert_array_equal(store.find("1.1-a", b"image 7"), np.full((2, 1, 1), 7, np.float32))
    assert store.find("2.1-b", b"image 7") is None and store.find("1.1-a", b"image 8") is None


def test_what_is_too_old_is_not_read_and_then_forgotten(tmp_path, now):
    with FeatureStore(tmp_path / "s.db", RingLimits(max_age_s=60), clock=lambda: now[0]) as store:
        put(store, 1)
        now[0] += 61
        assert store.latest() is None and store.after(0, limit=9) == []
        put(store, *range(2, 66))
        assert store.bounds() == (2, 65)


@pytest.mark.parametrize("limits", [RingLimits(max_features=10), RingLimits(max_bytes=80)])
def test_the_oldest_go_when_there_are_too_many_and_numbers_never_come_again(tmp_path, limits):
    with FeatureStore(tmp_path / "s.db", limits) as store:
        put(store, *range(64))
        assert store.bounds() == (55, 64)
    with sqlite3.connect(tmp_path / "s.db") as db:
        db.execute("DELETE FROM features")
    db.close()
    with FeatureStore(tmp_path / "s.db", limits) as store:
        assert store.bounds() == (65, 64)
        assert put(store, 1) == [65]


def test_what_was_published_does_not_change(store, tmp_path):
    put(store, 1)
    with sqlite3.connect(tmp_path / "loop.db") as db, pytest.raises(sqlite3.IntegrityError, match="does not change"):
        db.execute("UPDATE features SET z = zeroblob(8)")
    db.close()


def test_the_file_is_the_producers_alone(store, tmp_path):
    put(store, 1)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("loop.db*")} == {"0o600"}


def test_a_version_keeps_its_terms(store):
    terms = VersionTerms(version="1.1-a", bits=4.0, noise_version="1.1 e m")
    store.remember(terms)
    store.remember(terms)
    assert store.terms("1.1-a") == terms and store.knows("1.1-a") and not store.knows("1.2-b")
    with pytest.raises(LedgerError, match="other terms"):
        store.remember(VersionTerms(version="1.1-a", bits=5.0, noise_version="1.1 e m"))
    with pytest.raises(LedgerError, match="not in"):
        store.terms("1.2-b")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "s.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match="feature stream"):
        FeatureStore(tmp_path / "s.db")
    with pytest.raises(ConfigError, match="limits must be > 0"):
        RingLimits(max_age_s=0)


def _append(path: Path, n: int, start) -> None:
    start.wait()
    with FeatureStore(path) as store:
        for value in range(n):
            put(store, value)


def test_processes_append_at_once_and_every_number_is_given_once(tmp_path):
    path, context = tmp_path / "s.db", multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=_append, args=(path, 50, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with FeatureStore(path) as store:
        assert [f.sequence for f in store.after(0, limit=1000)] == list(range(1, 151))


def _append_and_die(path: Path) -> None:
    put(FeatureStore(path), 1, 2, 3)
    os._exit(9)


def test_a_killed_process_loses_nothing_that_it_published(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=_append_and_die, args=(tmp_path / "s.db",))
    worker.start()
    worker.join(60)
    with FeatureStore(tmp_path / "s.db") as store:
        assert [f.sequence for f in store.after(0, limit=9)] == [1, 2, 3]
