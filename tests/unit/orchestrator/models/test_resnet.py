from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.models.resnet import BACKBONES, build_backbone
from orchestrator.models.split import build_encoder
from orchestrator.privacy.accounting import load_opacus
from orchestrator.privacy.dp import refuse_unsafe

NAMES = sorted(BACKBONES)


def stock(name: str, n_outputs: int) -> nn.Module:
    """torchvision's own network with GroupNorm: it works in place, and is the oracle for everything else."""
    build = getattr(torchvision.models, name)
    return build(num_classes=n_outputs, norm_layer=lambda c: nn.GroupNorm(min(32, c), c))


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_outputs_are_those_of_torchvision(name):
    ours, theirs = build_backbone(name, n_outputs=3, seed=0), stock(name, 3)
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_opacus_finds_nothing_to_fix(name):
    load_opacus()
    from opacus.validators import ModuleValidator

    network = build_backbone(name, n_outputs=3, seed=0)
    assert ModuleValidator.validate(network, strict=False) == []
    refuse_unsafe(network)


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_works_in_place_or_knows_the_batch(name):
    layers = list(build_backbone(name, n_outputs=3, seed=0).modules())
    assert not [layer for layer in layers if getattr(layer, "inplace", False)]
    assert not [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert all(layer.num_groups == min(32, layer.num_channels) for layer in layers if isinstance(layer, nn.GroupNorm))


@pytest.mark.parametrize(("name", "k"), [("resnet18", 6), ("resnet50", 5)])
def test_per_example_gradients_equal_micro_batches_of_one(name, k):
    """Through both kinds of block, with and without a convolution beside the sum."""
    load_opacus()
    from opacus import GradSampleModule

    network = build_encoder(name, k, seed=0).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = []
    for example in x:
        network.zero_grad()
        network(example[None]).square().sum().backward()
        expected.append({key: p.grad.clone() for key, p in network.named_parameters()})
    network.zero_grad()
    GradSampleModule(network, loss_reduction="sum")(x.requires_grad_()).square().sum().backward()
    for key, p in network.named_parameters():
        torch.testing.assert_close(p.grad_sample, torch.stack([e[key] for e in expected]), rtol=1e-9, atol=1e-9)


def test_all_weights_but_the_last_layer_are_the_same_for_any_number_of_outputs():
    two, ten = (build_backbone("resnet18", n_outputs=n, seed=5).state_dict() for n in (2, 10))
    assert all(torch.equal(two[key], ten[key]) for key in two if not key.startswith("fc."))
    assert two["fc.weight"].shape == (2, 512)
    assert ten["fc.weight"].shape == (10, 512)


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no backbone named 'vgg'; known: resnet18, resnet34, resnet50"):
        build_backbone("vgg", n_outputs=2, seed=0)


def test_a_backbone_without_outputs_is_refused():
    with pytest.raises(ConfigError, match="at least one output, got 0"):
        build_backbone("resnet18", n_outputs=0, seed=0)
