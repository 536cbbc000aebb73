"""The files that a sweep's processes share, on disk and behind a URL."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import CheckpointError, ConfigError, UnavailableError
from orchestrator.sweep.store import Store, is_url


@pytest.fixture(params=["path", "file", "memory"])
def store(request, tmp_path) -> Store:
    root = {"path": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}"}
    return Store(root[request.param])


def test_what_is_written_is_read_again_and_what_is_not_there_is_none(store):
    assert store.read("trials/a.json") is None and not store.exists("trials/a.json") and store.names("trials") == []
    store.write_json("trials/a.json", {"x": 1})
    store.write_json("trials/a.json", {"x": 2})
    store.write("trials/b.json", b"{}")
    assert store.read_json("trials/a.json") == {"x": 2}
    assert store.exists("trials/a.json") and store.names("trials") == ["a.json", "b.json"]
    store.remove("trials/a.json")
    store.remove("trials/a.json")
    assert store.names("trials") == ["b.json"]


def test_a_folder_of_it_is_a_store(store):
    store.within("sweeps", "r").write("x", b"1")
    assert store.read("sweeps/r/x") == b"1"


def test_states_survive_and_a_damaged_one_is_refused(store):
    store.write_state("encoders/a.state", {"w": torch.arange(3)}, kind="k")
    assert torch.equal(store.read_state("encoders/a.state", kind="k")["w"], torch.arange(3))
    data = store.read("encoders/a.state")
    assert data is not None
    store.write("encoders/a.state", data[:-2])
    with pytest.raises(CheckpointError):
        store.read_state("encoders/a.state", kind="k")
    with pytest.raises(CheckpointError):
        store.read_state("encoders/missing.state", kind="k")


def test_a_store_that_can_be_written_to_leaves_no_trace_of_having_been_tried(store):
    store.check_writable()
    assert store.names("") == []


def test_a_store_that_cannot_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for root in (str(tmp_path / "file"), f"file://{tmp_path}/file"):
        with pytest.raises(UnavailableError, match="--storage"):
            Store(root).check_writable()
    with pytest.raises(ConfigError, match="no known kind"):
        Store("nowhere://x").check_writable()


def test_a_url_is_told_from_a_path():
    assert is_url("s3://bucket/x") and is_url("file:///x")
    assert not is_url("/x") and not is_url("C:/x") and not is_url("x")
