"""The channel: never more power than d, never more bits than asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, NonFiniteFeatureError, PrivacyRefusal
from orchestrator.privacy.bounded.channel import (
    MIN_NOISE,
    RELEASE_STEP,
    ChannelConfig,
    power_normalise,
    quantised,
    transmit,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d", "tau", "bits"), [(8, 0.5, 9.288), (4, 0.5, 4.644), (4, 1.0, 2.0), (1, 1.0, 0.5)])
def test_the_capacity_is_that_of_the_specification(d, tau, bits):
    assert ChannelConfig(dimensions=d, noise=tau).bits_per_cell == pytest.approx(bits, abs=1e-3)


def test_the_cells_of_a_map_add_up():
    channel = ChannelConfig(dimensions=4, noise=1.0, cells=256)
    assert (channel.bits_per_cell, channel.bits_per_image, channel.capacity_bits) == (2.0, 512.0, 512.0)


@pytest.mark.parametrize(("bits", "d", "tau"), [(9.288, 8, 0.5), (4.644, 4, 0.5), (2.0, 2, 0.577), (0.5, 2, 1.554)])
def test_the_rule_gives_what_was_measured(bits, d, tau):
    channel = ChannelConfig.for_bits(bits)
    assert channel.dimensions == d
    assert channel.noise == pytest.approx(tau, abs=1e-3)


@settings(deadline=None)
@given(
    bits=st.floats(1e-3, 5000),
    dimensions=st.one_of(st.none(), st.integers(1, 512)),
    cells=st.integers(1, 64),
)
def test_a_channel_for_some_bits_carries_them_and_never_more(bits, dimensions, cells):
    try:
        channel = ChannelConfig.for_bits(bits, dimensions=dimensions, cells=cells)
    except ConfigError:
        assert dimensions is not None
        assert bits > cells * dimensions * 9.9
        return
    assert channel.bits_per_image <= bits
    assert channel.bits_per_image == pytest.approx(bits, rel=1e-9)


@settings(deadline=None)
@given(bits=st.floats(2, 500))
def test_the_rule_keeps_the_noise_near_a_half(bits):
    assert 0.39 < ChannelConfig.for_bits(bits).noise < 0.60


@pytest.mark.parametrize("tau", [MIN_NOISE, 0.999999, 1.0, 1.000001, 1e8, 1e200])
def test_the_capacity_is_exact_for_little_and_for_much_noise(tau):
    exact = math.log1p(tau**-2) / math.log(2) / 2 if tau < 1e150 else 0.0
    assert ChannelConfig(dimensions=1, noise=tau).bits_per_cell == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dimensions": 0, "noise": 1.0}, "dimensions"),
        ({"dimensions": 1, "noise": 0.0}, "noise"),
        ({"dimensions": 1, "noise": math.nan}, "noise"),
        ({"dimensions": 1, "noise": math.inf}, "noise"),
        ({"dimensions": 1, "noise": 1.0, "cells": 0}, "cells"),
    ],
)
def test_a_channel_that_bounds_nothing_is_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        ChannelConfig(**settings)


@pytest.mark.parametrize("bits", [0.0, -1.0, math.inf, math.nan])
def test_bits_that_no_channel_carries_are_refused(bits):
    with pytest.raises(ConfigError, match="bits"):
        ChannelConfig.for_bits(bits)


def test_too_few_dimensions_for_the_bits_are_named():
    with pytest.raises(ConfigError, match="do not go into 1 dimensions"):
        ChannelConfig.for_bits(40, dimensions=1)


def test_a_channel_survives_json_and_an_unknown_key_does_not():
    channel = ChannelConfig.for_bits(9.3, cells=4)
    assert ChannelConfig.from_json(channel.to_json()) == channel
    with pytest.raises(ConfigError, match="tau"):
        ChannelConfig.from_json({**channel.to_json(), "tau": 1.0})


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e20, 1e38], ids=str)
@pytest.mark.parametrize("shape", [(64, 1), (64, 8), (64, 512), (4, 8, 5, 3)], ids=str)
def test_every_vector_has_power_d_whatever_its_length(shape, scale):
    v = randn(*shape).clamp(-2, 2)
    s = power_normalise((v + v.sign()) * scale)
    assert s.shape == shape
    power = s.double().square().sum(1)
    assert torch.allclose(power, torch.full_like(power, shape[1]), rtol=1e-6, atol=0)


def test_the_direction_is_kept():
    v = randn(5, 3, dtype=torch.float64)
    assert torch.allclose(power_normalise(v), math.sqrt(3) * v / v.norm(dim=1, keepdim=True), rtol=1e-14)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e-7, -1e-7])
def test_a_vector_of_almost_nothing_has_at_most_power_d_and_a_finite_gradient(value):
    v = torch.full((2, 4), value, requires_grad=True)
    s = power_normalise(v)
    assert (s.square().sum(1) <= 4).all()
    assert torch.isfinite(s).all()
    s.sum().backward()
    assert torch.isfinite(v.grad).all()


def test_the_gradient_is_that_of_the_formula():
    v = randn(4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(power_normalise, (v,))


def test_one_vector_does_not_touch_another():
    v = randn(3, 4)
    assert torch.equal(power_normalise(v)[1:2], power_normalise(v[1:2]))


def test_half_precision_is_computed_in_single():
    assert power_normalise(randn(2, 4).half()).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused(bad):
    v = randn(2, 4)
    v[1, 2] = bad
    with pytest.raises(NonFiniteFeatureError, match="NaN or infinite"):
        power_normalise(v)


@pytest.mark.parametrize("v", [torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)])
def test_what_is_no_vector_is_refused(v):
    with pytest.raises(ConfigError, match=r"\(B, D\)"):
        power_normalise(v)


def test_the_noise_is_scaled_and_added():
    s, n = power_normalise(randn(3, 4)), randn(3, 4, seed=1)
    assert torch.equal(transmit(s, n, 0.5), s + 0.5 * n)
    assert transmit(s, n.double(), 0.5).dtype == torch.float64


@pytest.mark.parametrize("factor", [1.001, 100.0, math.nan])
def test_more_power_than_the_bound_allows_is_not_sent(factor):
    s = power_normalise(randn(3, 4))
    s[1] *= factor
    with pytest.raises(PrivacyRefusal, match="power"):
        transmit(s, torch.zeros(3, 4), 0.5)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_nothing_is_sent_without_noise(tau):
    with pytest.raises(ConfigError, match="noise"):
        transmit(torch.zeros(3, 4), torch.zeros(3, 4), tau)


def test_noise_of_another_shape_is_refused_and_not_broadcast():
    with pytest.raises(ConfigError, match="shape"):
        transmit(torch.zeros(3, 4), torch.zeros(1, 4), 0.5)


def test_what_is_released_is_on_a_grid_that_float16_holds():
    z = 5 * randn(1000, 4, dtype=torch.float64)
    q = quantised(z)
    assert ((q - z).abs() <= RELEASE_STEP / 2).all()
    assert torch.equal(q / RELEASE_STEP, (q / RELEASE_STEP).round())
    inside = q[q.abs() <= 16]
    assert torch.equal(inside.half().double(), inside)


def test_mutual_information_through_the_channel_is_below_its_capacity():
    """Two opposite vectors in one dimension: I is known by quadrature, and must be under the bound, and near a bit."""
    tau = 0.5
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    each = [torch.exp(-((grid - s) ** 2) / (2 * tau**2)) / math.sqrt(2 * math.pi) / tau for s in (-1, 1)]
    mixed = (each[0] + each[1]) / 2
    information = sum(0.5 * torch.trapezoid(p * torch.log2(p / mixed), grid) for p in each)
    assert 0.9 < information < ChannelConfig(dimensions=1, noise=tau).bits_per_cell
