"""The newest whole checkpoint counts; what is damaged or foreign is refused with what is wrong."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest
import torch

from orchestrator import checkpoint
from orchestrator.checkpoints import Checkpoints
from orchestrator.errors import CheckpointError


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(folder=tmp_path / "encoder", kind="encoder", identity="run-data")


def state(step: int) -> dict:
    return {"weights": torch.full((3,), float(step)), "seen": [{"a": 0.5}]}


def test_the_newest_is_found_and_two_are_kept(checkpoints):
    assert checkpoints.newest() is None
    for step in (3, 20, 100):
        checkpoints.save(step, state(step))
    step, saved = checkpoints.newest()
    assert step == 100
    assert saved["weights"].tolist() == [100.0] * 3
    assert len(list(checkpoints.folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_one_is_passed_over_for_the_one_before(checkpoints, damage, caplog):
    for step in (1, 2):
        checkpoints.save(step, state(step))
    newest = max(checkpoints.folder.iterdir())
    data = newest.read_bytes()
    newest.write_bytes({"truncated": data[:-7], "changed": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage])
    assert checkpoints.newest()[0] == 1
    assert "damaged" in caplog.text or "truncated" in caplog.text


def test_what_may_be_gone_back_to_stays_however_old(checkpoints):
    for step in range(6):
        checkpoints.save(step, state(step), spare={1})
    assert [path.name[-1] for path in sorted(checkpoints.folder.iterdir())] == ["1", "4", "5"]
    assert checkpoints.at(1)["weights"].tolist() == [1.0] * 3
    checkpoints.save(6, state(6))
    assert [path.name[-1] for path in sorted(checkpoints.folder.iterdir())] == ["5", "6"]


def test_where_none_is_whole_it_says_what_is_wrong_with_each(checkpoints):
    checkpoints.save(1, state(1))
    (path,) = checkpoints.folder.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is whole.*truncated"):
        checkpoints.newest()


def test_one_of_another_training_is_refused(checkpoints):
    checkpoints.save(1, state(1))
    with pytest.raises(CheckpointError, match="belongs to another training"):
        dataclasses.replace(checkpoints, identity="run-other-data").newest()
    with pytest.raises(CheckpointError, match="kind 'encoder'"):
        dataclasses.replace(checkpoints, kind="session").newest()


def test_a_full_disk_leaves_the_one_before_and_the_training_is_told(checkpoints, monkeypatch):
    checkpoints.save(1, state(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, state(2))
    assert "No space left" in checkpoints.try_save(2, state(2))
    monkeypatch.undo()
    assert checkpoints.newest()[0] == 1
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-000000000001"]


def test_what_a_killed_writer_left_is_swept_away(checkpoints):
    checkpoints.save(1, state(1))
    (checkpoints.folder / ".step-000000000002.abcd.tmp").write_bytes(b"half")
    assert checkpoints.newest()[0] == 1
    checkpoints.save(2, state(2))
    assert not list(checkpoints.folder.glob(".*"))
