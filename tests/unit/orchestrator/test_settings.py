"""What keeps a task private, from flags to what is built of them."""

from __future__ import annotations

import pytest

from orchestrator.config import from_mapping, to_mapping
from orchestrator.errors import ConfigError
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.dp import DpConfig
from orchestrator.settings.add_task import AddTaskSettings
from orchestrator.settings.task_privacy import TaskPrivacySettings
from orchestrator.settings.train import TrainSettings


def test_left_alone_the_settings_are_the_papers():
    assert TaskPrivacySettings().dissimilarity == DissimilarityConfig()
    assert TaskPrivacySettings().channel is None
    assert TaskPrivacySettings().network(NetworkConfig()) == NetworkConfig()


def test_bits_choose_dimensions_and_noise_as_measured():
    """9.3 bits are d = 8 and tau = .5 (SPEC E.7)."""
    settings = TaskPrivacySettings(task_privacy="bounded", feature_bits=9.3)
    assert settings.channel is not None
    assert (settings.channel.dimensions, settings.channel.noise) == (8, pytest.approx(0.5, abs=2e-3))
    network = settings.network(NetworkConfig(split_index=5))
    assert isinstance(network, BoundedNetworkConfig)
    assert network.task_shape(64) == (8, 1, 1)


def test_dimensions_and_noise_may_be_given_instead():
    settings = TaskPrivacySettings(task_privacy="bounded", feature_dimensions=3, feature_noise=1.0)
    assert settings.channel == ChannelConfig(dimensions=3, noise=1.0)


def test_dissimilarity_is_left_out_with_bounded_features_unless_it_is_asked_for():
    assert TaskPrivacySettings(task_privacy="bounded", feature_bits=4.0).dissimilarity.omega == 0
    assert TaskPrivacySettings(task_privacy="bounded", feature_bits=4.0, omega=0.001).dissimilarity.omega == 0.001
    assert TaskPrivacySettings(similarity="ms_ssim").dissimilarity == DissimilarityConfig(similarity="ms_ssim")


def test_settings_survive_toml():
    settings = TaskPrivacySettings(task_privacy="bounded", feature_bits=4.0)
    assert from_mapping(TaskPrivacySettings, to_mapping(settings), where="test") == settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"feature_bits": 4.0}, "give --task-privacy bounded"),
        ({"feature_noise": 0.5}, "give --task-privacy bounded"),
        ({"task_privacy": "bounded"}, "give --feature-bits, for instance 4"),
        ({"task_privacy": "bounded", "feature_dimensions": 4}, "or both --feature-dimensions and --feature-noise"),
        ({"task_privacy": "bounded", "feature_noise": 0.5}, "or both --feature-dimensions and --feature-noise"),
        ({"task_privacy": "bounded", "feature_bits": 4.0, "feature_dimensions": 4}, "chooses dimensions and noise"),
        ({"task_privacy": "bounded", "feature_bits": 0.0}, "must be a finite number > 0, got 0.0"),
        ({"task_privacy": "bounded", "feature_bits": float("nan")}, "must be a finite number > 0, got nan"),
        ({"task_privacy": "bounded", "feature_dimensions": 0, "feature_noise": 0.5}, "must be at least 1, got 0"),
        ({"task_privacy": "bounded", "feature_dimensions": 4, "feature_noise": 0.0}, "without noise nothing bounds"),
        ({"omega": -1.0}, "omega must be a finite number >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_does(given, said):
    with pytest.raises(ConfigError, match=said):
        TaskPrivacySettings(**given)


BOUNDED = TaskPrivacySettings(task_privacy="bounded", feature_bits=4.0)


def test_a_training_that_bounded_features_have_no_place_in_is_refused():
    with pytest.raises(ConfigError, match="has no privacy between tasks"):
        TrainSettings(tasks=("pose",), task_privacy=BOUNDED, algorithm="input", dp=DpConfig(epsilon=8.0))


def test_a_bounded_task_is_not_added_with_the_rest_of_the_backbone():
    with pytest.raises(ConfigError, match="choose --head mlp or linear"):
        AddTaskSettings(task="pose", task_privacy=BOUNDED, head="backbone")
