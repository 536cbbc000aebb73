from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.errors import ConfigError
from orchestrator.models.bounded_vector import BoundedVector
from orchestrator.models.cross_sec import CrossSec, FusedCrossSec, for_inference
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.models.split import build_encoder
from orchestrator.privacy.accounting import load_opacus
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.dp import refuse_unsafe

# SPEC C.2: fixed by five printed sizes.
PUBLISHED_WEIGHTS = {64: 12_288, 128: 49_152, 256: 196_608, 512: 786_432}


def n_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cross_sec(channels: int, **options: object) -> nn.Module:
    return build_module(ModuleConfig(channels=channels, **options), seed=0).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", PUBLISHED_WEIGHTS)
@pytest.mark.parametrize("kind", ["cross_sec", "sec"])
def test_there_are_three_weights_for_every_two_channels_and_no_biases(channels, kind):
    module = build_module(ModuleConfig(kind=kind, channels=channels), seed=0)
    assert n_weights(module) == PUBLISHED_WEIGHTS[channels] == 3 * channels**2
    assert not [name for name, _ in module.named_parameters() if "bias" in name]
    assert len(list(module.parameters())) == 8


@pytest.mark.parametrize(("splits", "expansion"), [(2, 1), (3, 2), (4, 2), (4, 4), (6, 3)])
def test_other_splits_and_expansions_have_the_weights_of_the_formula(splits, expansion):
    module = CrossSec(24, splits=splits, expansion=expansion)
    assert n_weights(module) == splits * (1 + 2 * expansion + 1) * (24 // splits) ** 2


def test_a_tiny_module_gives_what_numpy_gives():
    """Written out by hand for four channels in two splits, on a 1x2 map."""
    w0 = [np.array([[1.0, 0.5], [-0.5, 2.0]]), np.array([[0.0, 1.0], [1.0, -1.0]])]
    w1 = [np.arange(8.0).reshape(4, 2) / 4 - 1, np.arange(8.0)[::-1].reshape(4, 2) / 5 - 0.6]
    w2 = [np.arange(8.0).reshape(2, 4) / 8 - 0.4, 0.3 - np.arange(8.0).reshape(2, 4) / 6]
    v = [np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[0.5, 0.0], [-1.0, 1.0]])]
    x = np.array([[1.0, 3.0], [-2.0, 1.0], [0.5, 0.5], [2.0, -1.0]])  # channel, position

    def gate(j: int) -> np.ndarray:
        pooled = x[2 * j : 2 * j + 2].mean(axis=1)
        return 1 / (1 + np.exp(-w2[j] @ np.maximum(w1[j] @ (w0[j] @ pooled), 0)))

    module = CrossSec(4).double()
    with torch.no_grad():
        for j in range(2):
            module.gates[j][1].weight.copy_(torch.tensor(w0[j])[..., None, None])
            module.gates[j][3].weight.copy_(torch.tensor(w1[j]))
            module.gates[j][5].weight.copy_(torch.tensor(w2[j]))
            module.values[j].weight.copy_(torch.tensor(v[j])[..., None, None])
        z = module(torch.tensor(x)[None, :, None, :])[0, :, 0].numpy()
        module.shift = 0
        z_sec = module(torch.tensor(x)[None, :, None, :])[0, :, 0].numpy()
    crossed = np.concatenate([v[0] @ (x[:2] * gate(1)[:, None]), v[1] @ (x[2:] * gate(0)[:, None])])
    own = np.concatenate([v[0] @ (x[:2] * gate(0)[:, None]), v[1] @ (x[2:] * gate(1)[:, None])])
    np.testing.assert_allclose(z, crossed, rtol=1e-12)
    np.testing.assert_allclose(z_sec, own, rtol=1e-12)
    assert not np.allclose(crossed, own, atol=0.05)


def test_sec_has_the_same_weights_and_another_output():
    crossed, own = cross_sec(8), cross_sec(8, kind="sec")
    assert all(torch.equal(a, b) for a, b in zip(crossed.parameters(), own.parameters(), strict=True))
    x = randn(2, 8, 3, 3)
    with torch.no_grad():
        assert float((crossed(x) - own(x)).abs().max()) > 1e-3


def test_the_first_split_reaches_the_second_only_through_its_gate():
    """y_2 = V_2 (x_2 * a(x_1)): a change of x_1 that keeps its mean leaves y_2 alone, and x_2 does not gate itself."""
    module, x = cross_sec(8), randn(1, 8, 3, 3)
    moved = x.clone()
    moved[:, :4, 0, 0] += 1.0
    moved[:, :4, 2, 2] -= 1.0
    scaled = x.clone()
    scaled[:, 4:] *= 2.0
    with torch.no_grad():
        z, z_moved, z_scaled = module(x), module(moved), module(scaled)
        torch.testing.assert_close(z_moved[:, 4:], z[:, 4:], rtol=1e-12, atol=1e-12)  # same gate, same x_2
        assert not torch.allclose(z_moved[:, :4, 0, 0], z[:, :4, 0, 0], atol=1e-6)  # its own value path
        torch.testing.assert_close(z_moved[:, :4, 1, 1], z[:, :4, 1, 1], rtol=1e-12, atol=1e-12)  # at those places only
        torch.testing.assert_close(z_scaled[:, 4:], 2 * z[:, 4:], rtol=1e-12, atol=1e-12)  # y_2 is linear in x_2
        assert not torch.allclose(z_scaled[:, :4], z[:, :4], atol=1e-6)  # whose gate is y_1's


def test_with_more_splits_the_gates_move_on_by_one():
    module, x = cross_sec(9, splits=3), randn(1, 9, 2, 2)
    with torch.no_grad():
        z = module(x)
        for changed, gated in ((0, 2), (1, 0), (2, 1)):
            other = x.clone()
            other[:, 3 * changed : 3 * changed + 3] += 1.0
            moved = (module(other) - z).abs().amax((0, 2, 3)).view(3, 3).amax(1) > 1e-9
            assert set(moved.nonzero().flatten().tolist()) == {changed, gated}


@pytest.mark.parametrize("kind", ["cross_sec", "sec", "conv1x1", "identity"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 3)])
def test_a_feature_keeps_its_shape_on_maps_of_any_size(kind, shape):
    module = build_module(ModuleConfig(kind=kind, channels=8), seed=0)
    assert module(torch.zeros(3, 8, *shape)).shape == (3, 8, *shape)
    assert module(torch.zeros(0, 8, *shape)).shape == (0, 8, *shape)


def test_on_a_one_by_one_map_a_gate_sees_the_feature_itself():
    module, x = cross_sec(4), randn(2, 4, 1, 1)
    with torch.no_grad():
        z, wide = module(x), module(x.expand(2, 4, 5, 5))
    torch.testing.assert_close(wide, z.expand(2, 4, 5, 5), rtol=1e-12, atol=1e-12)


def test_per_example_gradients_behind_an_encoder_equal_micro_batches_of_one():
    load_opacus()
    from opacus import GradSampleModule

    encoder = build_encoder("resnet18", 5, seed=0)
    network = nn.Sequential(encoder, build_module(ModuleConfig(channels=64), seed=1)).double()
    refuse_unsafe(network)
    x, direction = randn(3, 3, 32, 32), randn(3, 64, 8, 8, seed=1)
    expected = []
    for i in range(3):
        network.zero_grad()
        (network(x[i : i + 1]) * direction[i : i + 1]).sum().backward()
        expected.append([p.grad.clone() for p in network.parameters()])
    network.zero_grad()
    GradSampleModule(network, loss_reduction="sum")(x.requires_grad_()).backward(direction)
    for k, p in enumerate(network.parameters()):
        torch.testing.assert_close(p.grad_sample, torch.stack([e[k] for e in expected]), rtol=1e-9, atol=1e-9)


def test_channels_that_the_splits_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="9 channels cannot be divided into 2 equal splits"):
        CrossSec(9)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(("splits", "expansion"), [(2, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 1, 1), (4, 2, 6)])
def test_a_fused_module_gives_the_same(splits, expansion, cross, shape):
    module = CrossSec(24, splits=splits, expansion=expansion, cross=cross).double()
    b, h, w = shape
    x = randn(b, 24, h, w)
    torch.testing.assert_close(for_inference(module)(x), module(x), rtol=0, atol=1e-12)


def test_a_fused_module_has_copies_of_the_weights_and_no_parameters():
    module, x = CrossSec(8), randn(2, 8, 3, 3).float()
    fused = for_inference(module)
    before = fused(x)
    assert isinstance(fused, FusedCrossSec)
    assert not list(fused.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close(fused(x), before)


def test_only_what_can_be_fused_in_a_module_is():
    channel = ChannelConfig(dimensions=4, noise=0.5)
    module = build_module(ModuleConfig(channels=8, channel=channel), seed=0).eval()
    fused, x = for_inference(module), randn(2, 8, 4, 4).float()
    assert [type(child) for child in fused.children()] == [FusedCrossSec, BoundedVector]
    assert isinstance(module.metamorphosis, CrossSec)
    torch.testing.assert_close(fused(x), module(x))
    plain = nn.Conv2d(8, 8, 1)
    torch.testing.assert_close(for_inference(plain)(x), plain(x), rtol=0, atol=0)
