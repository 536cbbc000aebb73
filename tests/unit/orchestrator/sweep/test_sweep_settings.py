"""From a sweep's settings to those of its trials."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import ROOT

from orchestrator.assembly import SessionConfig
from orchestrator.config import from_mapping, read_toml, to_mapping
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.dp import DpConfig
from orchestrator.settings.task_privacy import TaskPrivacySettings
from orchestrator.settings.train import TrainSettings
from orchestrator.sweep.settings import SpaceSettings, SweepRuntime, SweepSettings
from orchestrator.sweep.space import Point

GOOD = SweepSettings(private="who", tasks=("pose",), space=SpaceSettings(omega="0,1e-3"))


@pytest.mark.parametrize("name", ["celeba", "digits", "faces", "statefarm"])
def test_a_preset_of_train_is_one_of_sweep_and_what_is_not_swept_is_as_it_says(name):
    path = ROOT / "pipelines" / "presets" / f"{name}.toml"
    train, sweep = read_toml(TrainSettings, path), read_toml(SweepSettings, path)
    (point,) = sweep.searched.grid()
    made = sweep.training_of(point)
    assert dataclasses.replace(made, runtime=train.runtime) == dataclasses.replace(
        train, task_privacy=made.task_privacy
    )
    assert made.task_privacy.dissimilarity == train.task_privacy.dissimilarity


def test_a_space_may_come_from_toml():
    mapping = {"private": "who", "tasks": ["pose"], "space": {"omega": "0,1", "epsilon": "1,none"}}
    found = from_mapping(SweepSettings, mapping, where="test")
    assert len(found.searched.grid()) == 4
    assert from_mapping(SweepSettings, to_mapping(found), where="test") == found


def test_a_trial_is_trained_as_its_point_says():
    point = Point(omega=0.5, epsilon=2.0, split_index=7, feature_bits=4.0, seed=3)
    made = GOOD.training_of(point)
    assert (made.dp.epsilon, made.network.split_index, made.seed) == (2.0, 7, 3)
    assert made.task_privacy.dissimilarity.omega == 0.5
    network = made.task_privacy.network(made.network)
    assert isinstance(network, BoundedNetworkConfig) and network.channel.bits_per_image == pytest.approx(4.0)


def test_omega_that_is_not_named_is_the_one_of_its_kind_of_feature():
    bits = dataclasses.replace(GOOD, space=SpaceSettings(feature_bits="4,none"))
    omegas = {p.feature_bits: bits.resolved(p).omega for p in bits.searched.grid()}
    assert omegas == {4.0: 0.0, None: 0.001}


def test_a_sweep_over_bits_leaves_the_bound_out_where_it_says_none():
    base = dataclasses.replace(
        GOOD,
        task_privacy=TaskPrivacySettings(task_privacy="bounded", feature_dimensions=3, feature_noise=1.0),
        space=SpaceSettings(feature_bits="2,none"),
    )
    channels = [base.training_of(p).task_privacy.channel for p in base.searched.grid()]
    assert channels[0] is not None and channels[0].bits_per_image == pytest.approx(2.0)
    assert channels[1] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ()}, "--tasks"),
        ({"private": None}, "no attribute to measure leakage on"),
        ({"objectives": ()}, "needs an objective"),
        ({"space": SpaceSettings()}, "a single point"),
        ({"space": SpaceSettings(omega="0")}, "a single point"),
        ({"space": SpaceSettings(omega="uniform:0:1")}, "a grid needs values, and --omega is a range"),
        ({"trials": 3}, "leave --trials out"),
        ({"search": "random"}, "give --trials"),
        ({"search": "optuna", "trials": 0}, "give --trials"),
        ({"search": "optuna", "trials": 2, "space": SpaceSettings(omega="0,1", seeds="0,1")}, "one seed"),
        ({"dp": DpConfig(epsilon=1.0, dp_mode="whole")}, "surrogate_then_freeze"),
        ({"asha": True, "training": SessionConfig(epochs=1)}, "2 epochs at least"),
        ({"asha": True, "objectives": ("leakage", "epsilon")}, "add utility"),
        ({"asha": True, "runtime": SweepRuntime(engine="process")}, "side by side"),
    ],
)
def test_what_contradicts_itself_is_refused(change, said):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(GOOD, **change).check()
    assert said in str(caught.value)


def test_an_unknown_objective_is_refused():
    with pytest.raises(UnknownNameError):
        dataclasses.replace(GOOD, objectives=("utility", "speed")).check()


def test_what_is_good_is_not_refused():
    GOOD.check()
    dataclasses.replace(GOOD, search="random", trials=3, space=SpaceSettings(omega="loguniform:1e-4:1")).check()


def test_a_combination_that_train_refuses_is_refused():
    sold = dataclasses.replace(GOOD, tasks=("who",))
    with pytest.raises(ConfigError, match="either hidden or sold"):
        sold.training_of(sold.searched.grid()[0])


@pytest.mark.parametrize(
    ("storage", "remote"), [("s3://bucket/x", True), ("file:///mnt/x", True), ("/x", False), (None, False)]
)
def test_a_url_is_shared_and_the_drivers_own_folder_is_at_home(monkeypatch, tmp_path, storage, remote):
    monkeypatch.setenv("METAMORPHOSIS_HOME", str(tmp_path))
    runtime = SweepRuntime(storage=storage)
    assert runtime.is_remote == remote
    assert runtime.shared == (storage or str(tmp_path))
    assert str(runtime.local.storage_path) == (str(tmp_path) if remote or storage is None else storage)


def test_defaults_are_those_of_a_training():
    assert SweepSettings().network == NetworkConfig() == TrainSettings.__dataclass_fields__["network"].default
