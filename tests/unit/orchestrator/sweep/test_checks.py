"""What is refused before the first trial."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.errors import ConfigError, DataError, UnavailableError, UnknownNameError
from orchestrator.network import NetworkConfig
from orchestrator.sweep.checks import check_attackable, check_maps, check_places, check_points
from orchestrator.sweep.settings import SpaceSettings, SweepSettings
from orchestrator.sweep.store import Store
from tasks.spec import TaskSpec

SETTINGS = SweepSettings(private="who", tasks=("pose",), space=SpaceSettings(omega="0,1"))
WHO, POSE = (TaskSpec(name=n, target=n, classes=("a", "b")) for n in ("who", "pose"))
DEPTH = dataclasses.replace(POSE, name="depth", head="dense")


@pytest.mark.parametrize(("split", "size"), [(9, 64), (8, 32)])
def test_a_dense_task_needs_a_map_with_places(split, size):
    with pytest.raises(ConfigError, match=r"512x1x1, and depth needs a map") as caught:
        check_maps(NetworkConfig(split_index=split), {"who": WHO, "depth": DEPTH}, size=size)
    assert "smaller split index" in str(caught.value)
    check_maps(NetworkConfig(split_index=split), {"who": WHO, "pose": POSE}, size=size)
    check_maps(NetworkConfig(split_index=8), {"depth": DEPTH}, size=64)


def test_every_point_is_looked_at():
    specs = {"who": WHO, "pose": POSE}
    deep = dataclasses.replace(SETTINGS, space=SpaceSettings(split_index="5,6,10"))
    with pytest.raises(ConfigError, match="split index"):
        check_points(deep, deep.searched.grid(), specs, size=32)
    headless = dataclasses.replace(SETTINGS, network=NetworkConfig(head="nope"))
    with pytest.raises(UnknownNameError, match="nope"):
        check_points(headless, headless.searched.grid(), specs, size=32)
    check_points(SETTINGS, SETTINGS.searched.grid(), specs, size=32)


def test_bits_are_not_for_dense_tasks_yet():
    settings = dataclasses.replace(SETTINGS, tasks=("depth",), space=SpaceSettings(feature_bits="none,4"))
    with pytest.raises(ConfigError, match="depth is none"):
        check_points(settings, settings.searched.grid(), {"who": WHO, "depth": DEPTH}, size=32)


def test_leakage_needs_an_attribute_that_is_not_the_tasks_own():
    with pytest.raises(DataError, match="no attribute to measure leakage on"):
        check_attackable(SETTINGS, {"pose": POSE})
    with pytest.raises(DataError, match="no classification task"):
        check_attackable(dataclasses.replace(SETTINGS, tasks=("depth",)), {"who": WHO, "depth": DEPTH})
    check_attackable(SETTINGS, {"who": WHO, "pose": POSE})
    check_attackable(dataclasses.replace(SETTINGS, objectives=("utility", "epsilon")), {"pose": POSE})


def test_results_must_have_a_place(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    good = Store(str(tmp_path / "store"))
    with pytest.raises(ConfigError, match="--out"):
        check_places(good, tmp_path / "file" / "out")
    with pytest.raises(UnavailableError, match="--storage"):
        check_places(Store(str(tmp_path / "file")), None)
    check_places(good, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
