from __future__ import annotations

import json

import pytest
import torch

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.models.modules import MODULES, ModuleConfig, build_module
from orchestrator.privacy.bounded.channel import ChannelConfig


@pytest.mark.parametrize("kind", MODULES)
def test_a_configuration_survives_json_and_builds_the_same_module(kind):
    for channel in (None, ChannelConfig(dimensions=5, noise=0.5)):
        original = ModuleConfig(kind=kind, channels=12, splits=3, expansion=4, channel=channel)
        again = ModuleConfig.from_json(json.loads(json.dumps(original.to_json())))
        assert again == original
        one, two = build_module(original, seed=3).state_dict(), build_module(again, seed=3).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one | two)


def test_a_configuration_that_was_published_before_there_were_channels_still_loads():
    published = {"kind": "cross_sec", "channels": 64, "splits": 2, "expansion": 2}
    assert ModuleConfig.from_json(published) == ModuleConfig(channels=64)
    assert ModuleConfig(channels=64).to_json() == published, "and is written as it was, whoever reads it"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"channels": 8, "reduction": 4}, "unknown key.*reduction"),
        ({"kind": "sec"}, "channels"),
        ({"channels": "8"}, "expected int"),
        ({"channels": 8, "channel": {"dimensions": 4, "noise": 0.0}}, "noise of a bounded feature"),
        ({"channels": 8, "channel": {"dimensions": 4, "noise": 0.5, "power": 2}}, "unknown key.*power"),
        ({"channels": 8, "channel": {"dimensions": 4, "noise": 0.5, "cells": 6}}, "a square map"),
    ],
)
def test_json_with_anything_but_the_known_keys_and_types_is_refused(data, words):
    with pytest.raises(ConfigError, match=words):
        ModuleConfig.from_json(data)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"channels": 0}, "channels of a metamorphosis module must be at least 1, got 0"),
        ({"channels": 8, "expansion": 0}, "expansion of a metamorphosis module must be at least 1"),
        ({"channels": 9}, "cross_sec cannot cut 9 channels into 2 equal splits"),
        ({"channels": 8, "kind": "sec", "splits": 3}, "sec cannot cut 8 channels into 3 equal splits"),
        ({"channels": 8, "splits": 1}, "at least 2 splits to cross"),
    ],
)
def test_a_module_that_could_not_be_built_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        ModuleConfig(**values)


def test_channels_need_no_division_where_there_are_no_splits():
    x = torch.randn(2, 9, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_module(ModuleConfig(kind="identity", channels=9), seed=0)(x), x)
    module = build_module(ModuleConfig(kind="conv1x1", channels=9), seed=0)
    (weight,) = module.parameters()
    expected = torch.einsum("oi,bihw->bohw", weight[..., 0, 0], x)
    torch.testing.assert_close(module(x), expected)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="'transformer'; known: conv1x1, cross_sec, identity, sec"):
        ModuleConfig(kind="transformer", channels=8)
