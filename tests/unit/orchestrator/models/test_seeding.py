from __future__ import annotations

import pytest
import torch

from orchestrator.errors import ConfigError
from orchestrator.models.heads import HeadConfig, build_head
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.models.resnet import build_backbone
from orchestrator.models.seeding import seeded
from orchestrator.models.split import build_encoder, feature_shape

LINEAR = HeadConfig(kind="linear", backbone="resnet18", split_index=8, n_outputs=2, feature_shape=(512, 2, 2))
REST = HeadConfig(kind="backbone", backbone="resnet18", split_index=8, n_outputs=2, feature_shape=(512, 2, 2))
BUILDERS = {
    "backbone": lambda seed: build_backbone("resnet18", n_outputs=2, seed=seed),
    "encoder": lambda seed: build_encoder("resnet18", 5, seed=seed),
    "module": lambda seed: build_module(ModuleConfig(channels=8), seed=seed),
    "linear head": lambda seed: build_head(LINEAR, seed=seed),
    "backbone head": lambda seed: build_head(REST, seed=seed),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_seed_alone_decides_the_weights_and_the_process_keeps_its_random_state(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = BUILDERS[name](3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = BUILDERS[name](3).state_dict(), BUILDERS[name](4).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_asking_for_a_shape_draws_no_random_number():
    before = torch.get_rng_state()
    feature_shape("resnet50", 7, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_inside_puts_the_random_state_back_too():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), seeded(0):
        torch.rand(3)
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_the_generator_cannot_take_is_refused(seed):
    with pytest.raises(ConfigError, match="between 0 and 18446744073709551615"), seeded(seed):
        pass


def test_the_largest_seed_is_taken():
    with seeded(2**64 - 1):
        assert torch.isfinite(torch.rand(1)).all()
