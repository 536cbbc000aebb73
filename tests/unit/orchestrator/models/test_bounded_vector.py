"""The module that ends in a short vector: its power is known whatever its weights are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from orchestrator.errors import ConfigError, NonFiniteFeatureError
from orchestrator.models.bounded_vector import BoundedMap, BoundedVector
from orchestrator.models.modules import MODULES, ModuleConfig, build_module
from orchestrator.network import BoundedNetworkConfig, NetworkConfig
from orchestrator.privacy.bounded.channel import ChannelConfig

CHANNEL = ChannelConfig(dimensions=8, noise=0.5)
SHAPES = [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1), (6, 3, 5)]


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_vector_has_power_d_for_any_weights_and_any_map(shape, scale):
    module = build_module(ModuleConfig(kind="identity", channels=shape[0], channel=CHANNEL), seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * maps(*parameter.shape, seed=parameter.numel()))
    s = module(maps(5, *shape))
    assert s.shape == (5, 8, 1, 1)
    torch.testing.assert_close(s.square().sum(1).flatten(), torch.full((5,), 8.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module_may_end_in_a_vector_and_gives_the_shape_that_it_says(kind):
    config = ModuleConfig(kind=kind, channels=8, channel=CHANNEL)
    assert (
        config.feature_shape((8, 6, 6)) == tuple(build_module(config, seed=0)(maps(1, 8, 6, 6)).shape[1:]) == (8, 1, 1)
    )
    plain = dataclasses.replace(config, channel=None)
    assert plain.feature_shape((8, 6, 6)) == (8, 6, 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_maps_are_not_halved_away(shape):
    """The two convolutions leave at least 2x2 cells of a map that has them, and every input cell counts."""
    module = BoundedVector(shape[0], 4)
    x = maps(1, *shape).requires_grad_()
    module.layers[:6](x).square().sum().backward()
    assert module.layers[:6](x).shape[-1] >= min(2, shape[-1])
    assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("channels", [4, 8, 64, 512])
def test_a_vector_behind_a_one_by_one_map_still_depends_on_it(channels):
    """With a group a channel, GroupNorm would make the same of every 1x1 map."""
    module = BoundedVector(channels, 4)
    s = module(maps(2, channels, 1, 1))
    assert not torch.allclose(s[0], s[1])


def test_power_goes_to_what_differs_between_images_from_the_beginning():
    """What is rectified is alike for the most part: with weights of any mean, so is what is made of it."""
    ours, of_any_mean = 0.0, 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        x = (maps(1, 64, 8, 8, seed=seed) + 0.5 * maps(64, 64, 8, 8, seed=100 + seed)).relu()
        module = BoundedVector(64, 8)
        ours += varying(module(x))
        module.layers[-1].reset_parameters()
        of_any_mean += varying(module(x))
    assert ours > 1.25 * of_any_mean


def varying(s: torch.Tensor) -> float:
    """Which part of the power differs from image to image."""
    return float(s.detach().var(0).sum() / s.detach().square().mean(0).sum())


def test_other_images_in_the_batch_change_nothing():
    module, x = BoundedVector(8, 4), maps(6, 8, 8, 8)
    torch.testing.assert_close(module(x)[2:3], module(x[2:3]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "side"), [((64, 16, 16), 4), ((128, 8, 8), 8), ((6, 4, 4), 2), ((512, 2, 2), 2)])
def test_every_cell_of_a_map_has_power_d_for_any_weights(shape, side):
    channel = ChannelConfig(dimensions=3, noise=0.5, cells=side**2)
    config = ModuleConfig(kind="identity", channels=shape[0], channel=channel)
    module = build_module(config, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(100 * maps(*parameter.shape, seed=parameter.numel()))
    s = module(maps(5, *shape))
    assert config.feature_shape(shape) == tuple(s.shape[1:]) == (3, side, side)
    torch.testing.assert_close(s.square().sum(1), torch.full((5, side, side), 3.0), rtol=1e-5, atol=0)


def test_other_images_in_the_batch_change_nothing_of_a_map():
    module, x = BoundedMap(8, 4, 2), maps(6, 8, 8, 8)
    torch.testing.assert_close(module(x)[2:3], module(x[2:3]), rtol=1e-5, atol=1e-5)


def test_more_cells_than_the_map_has_places_are_refused():
    channel = ChannelConfig(dimensions=3, noise=0.5, cells=64)
    with pytest.raises(ConfigError, match="64 vectors an image do not fit a map of 4x4: use at most 16 cells"):
        ModuleConfig(channels=64, channel=channel).feature_shape((64, 4, 4))


def test_a_module_that_has_diverged_says_so():
    module = BoundedVector(8, 4)
    nn.init.constant_(module.layers[-1].weight, torch.nan)
    with pytest.raises(NonFiniteFeatureError, match="has diverged"):
        module(maps(1, 8, 8, 8))


def test_a_network_with_a_channel_changes_the_tasks_and_not_the_encoder():
    plain = NetworkConfig(split_index=5)
    bounded = BoundedNetworkConfig.of(plain, CHANNEL)
    assert bounded.shape(16) == plain.shape(16) == plain.task_shape(16) == (64, 4, 4)
    assert bounded.task_shape(16) == (8, 1, 1)
    one, two = plain.build_encoder(seed=3).state_dict(), bounded.build_encoder(seed=3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    (module,) = bounded.build_modules(["pose"], 16, seed=0).values()
    (head,) = bounded.build_heads({"pose": 3}, 16, seed=0).values()
    assert head(module(maps(2, 64, 4, 4))).shape == (2, 3)


@pytest.mark.parametrize(("asked", "built"), [("backbone", "mlp"), ("mlp", "mlp"), ("linear", "linear")])
def test_the_rest_of_the_backbone_gives_way_to_an_mlp(asked, built):
    bounded = BoundedNetworkConfig.of(NetworkConfig(head=asked), CHANNEL)
    assert bounded.head_config(64, 2).kind == built
    assert NetworkConfig(head=asked).head_config(64, 2).kind == asked
