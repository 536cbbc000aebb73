import errno
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

from orchestrator import checkpoint
from orchestrator.checkpoint import load_state, load_weights, save_state, save_weights, weights_hash
from orchestrator.errors import CheckpointError


def same(a: object, b: object) -> bool:
    """Equal in value and type, all the way down; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and weights_hash({"": a}) == weights_hash({"": b})
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) and type(k) is type(j) for k, j in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return math.isnan(b) if isinstance(a, float) and math.isnan(a) else a == b


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=20)
    | npst.arrays(
        st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u1", "u4", "bool", "c8"]),
        npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ).flatmap(lambda a: st.sampled_from([a, torch.from_numpy(a.copy())]))
    | st.sampled_from([np.float32(1.5), np.float64("nan"), np.int64(-3), np.bool_(True)])
)
trees = st.dictionaries(
    st.text(max_size=5) | st.integers(),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=trees)
def test_any_nested_state_comes_back_with_the_same_values_and_types(tmp_path: Path, state: dict) -> None:
    save_state(tmp_path / "state", state, kind="test")
    assert same(load_state(tmp_path / "state", kind="test"), state)


def test_an_optimiser_goes_on_from_a_saved_state_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    step(layer, optimizer)
    state = {"layer": layer.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save_state(tmp_path / "s", state, kind="session")
    step(layer, optimizer)

    loaded = load_state(tmp_path / "s", kind="session")
    assert same(loaded["optimizer"], state["optimizer"] | {"state": loaded["optimizer"]["state"]})
    assert list(loaded["optimizer"]["state"]) == [0, 1]
    again = nn.Linear(3, 2)
    again.load_state_dict(loaded["layer"])
    resumed = torch.optim.AdamW(again.parameters(), lr=0.5)
    resumed.load_state_dict(loaded["optimizer"])
    step(again, resumed)
    assert weights_hash(again.state_dict()) == weights_hash(layer.state_dict())
    generator = torch.Generator()
    generator.set_state(loaded["rng"])
    torch.testing.assert_close(generator.get_state(), state["rng"], rtol=0, atol=0)


def test_loaded_tensors_are_not_views_of_the_file(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"t": torch.ones(4), "a": np.ones(4)}, kind="k")
    loaded = load_state(tmp_path / "s", kind="k")
    loaded["t"].add_(1)
    loaded["a"] += 1
    assert same(load_state(tmp_path / "s", kind="k"), {"t": torch.ones(4), "a": np.ones(4)})


def test_views_of_one_memory_and_transposed_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    save_state(tmp_path / "s", {"a": base, "b": base.t(), "c": base[:, 1]}, kind="k")
    loaded = load_state(tmp_path / "s", kind="k")
    assert same(loaded, {"a": base, "b": base.t().contiguous(), "c": base[:, 1].contiguous()})


@pytest.mark.parametrize("value", [object(), {1.5: 0}, {True: 1}, {1, 2}, np.array(["a"]), np.array([None])])
def test_what_has_no_place_in_a_state_is_refused_with_its_path(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save state\.here\.1"):
        save_state(tmp_path / "s", {"here": [0, value]}, kind="k")
    assert list(tmp_path.iterdir()) == []


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    save_state(path, {"weights": torch.arange(100.0), "step": 3, "blob": b"secret"}, kind="session")
    return path


def test_a_state_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated|not a safetensors|damaged"):
            load_state(path, kind="session")


def test_a_single_changed_byte_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padding = len(data[8 : 8 + length]) - len(data[8 : 8 + length].rstrip())
    for position in [*range(0, len(data), 41), len(data) - 1]:
        if 8 + length - padding <= position < 8 + length:
            continue
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_state(path, kind="session")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"{}", "truncated"),
        (b"PK\x03\x04 a pickle of old", "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "header is not an object"),
        ((2).to_bytes(8, "little") + b"xx", "header is not JSON"),
        (safetensors.torch.save({"w": torch.ones(2)}), "other origin"),
    ],
)
def test_a_foreign_file_is_refused_as_such(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_state(tmp_path / "s", kind="session")


def test_another_kind_another_version_and_a_missing_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="kind 'session', not 'encoder-training'"):
        load_state(path, kind="encoder-training")
    with pytest.raises(CheckpointError, match="No such file"):
        load_state(tmp_path / "nowhere", kind="session")
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    with pytest.raises(CheckpointError, match="format version 1, this program reads 2"):
        load_state(path, kind="session")


@pytest.mark.parametrize("broken", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_whole_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif broken == "rename":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(Path, "open", lambda self, mode="r": OneByteDisk(self))
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"weights": torch.zeros(1000)}, kind="session")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert load_state(path, kind="session")["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


class OneByteDisk:
    """A file on a disk with room for one byte more."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT)

    def __enter__(self) -> "OneByteDisk":
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self.fd)

    def write(self, data: bytes) -> None:
        os.write(self.fd, data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_content_is_on_the_disk_before_the_name_points_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(fd: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{fd}").resolve().is_dir() else "file")
        fsync(fd)

    def log_replace(self: Path, target: Path) -> Path:
        assert self.parent == target.parent
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    save_state(tmp_path / "s", {}, kind="k")
    assert events == ["file", "rename", "folder"]


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for module, names in (("pickle", ("dumps", "loads", "Pickler", "Unpickler")), ("torch", ("save", "load"))):
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", refuse)
    saved(tmp_path)
    load_state(tmp_path / "state", kind="session")


def test_published_weights_come_back_with_their_config_and_the_files_own_sha256(tmp_path: Path) -> None:
    state = nn.Conv2d(2, 3, 1).state_dict()
    path = tmp_path / "module" / "weights.safetensors"
    digest = save_weights(path, state, {"kind": "conv1x1", "channels": 2})
    loaded, config = load_weights(path)
    assert weights_hash(loaded) == weights_hash(state)
    assert config == {"kind": "conv1x1", "channels": 2}
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {p.name for p in path.parent.iterdir()} == {"weights.safetensors", "config.json"}


def test_the_sha256_of_weights_does_not_depend_on_order_or_container(tmp_path: Path) -> None:
    state = {"b": torch.ones(3), "a": torch.arange(4)}
    reordered = {"a": np.arange(4), "b": np.ones(3, dtype=np.float32)}
    first = save_weights(tmp_path / "1" / "w.safetensors", state, {})
    assert save_weights(tmp_path / "2" / "w.safetensors", reordered, {}) == first
    assert save_weights(tmp_path / "3" / "w.safetensors", state | {"b": torch.ones(3) * 2}, {}) != first


def test_tampered_weights_and_a_foreign_config_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"w": torch.ones(3)}, {"a": 1})
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not match the checksum"):
        load_weights(path)
    path.write_bytes(good)
    (tmp_path / "config.json").write_text(json.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_weights(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        load_weights(path)


def test_the_weights_hash_sees_names_shapes_dtypes_and_values_and_nothing_else() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 3)}
    reference = weights_hash(base)
    assert weights_hash(dict(reversed(base.items()))) == reference
    assert weights_hash({**base, "b": torch.zeros(3, 2).t()}) == reference
    different = [
        {"a": base["a"], "c": base["b"]},
        {**base, "b": torch.zeros(3, 2)},
        {**base, "b": torch.zeros(2, 3, dtype=torch.int32)},
        {**base, "a": torch.tensor([1.0, 2.0000002])},
        {"a": base["a"]},
    ]
    assert len({reference, *map(weights_hash, different)}) == len(different) + 1
