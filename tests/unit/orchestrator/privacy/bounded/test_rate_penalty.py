"""The rate as a cost: it is the divergence that it says, and falls where a feature tells nothing but its class."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from orchestrator.privacy.bounded.channel import ChannelConfig, power_normalise
from orchestrator.privacy.bounded.rate_penalty import MEMORY, RatePenalty

CHANNEL = ChannelConfig(dimensions=4, noise=0.5)
SHAPE = (4, 1, 1)


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    v = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return power_normalise(v)[:, :, None, None]


def test_it_is_the_divergence_from_the_gaussian_of_the_class():
    s, y = vectors(64), torch.arange(64) % 2
    nats = RatePenalty(CHANNEL, SHAPE, 2)(s, y)
    for k in range(2):
        rows = s[y == k].flatten(1)
        prior = Normal(rows.mean(0), (rows.var(0, unbiased=False) + CHANNEL.noise**2).sqrt())
        sent = Independent(Normal(rows, CHANNEL.noise), 1)
        torch.testing.assert_close(nats[y == k], kl_divergence(sent, Independent(prior, 1)), rtol=1e-4, atol=1e-5)


def test_a_feature_that_is_its_class_and_nothing_else_costs_nothing_and_one_that_is_not_costs_less_than_capacity():
    y = torch.arange(64) % 2
    told = torch.where(y[:, None] == 1, 1.0, -1.0).expand(64, 4)[:, :, None, None]
    assert RatePenalty(CHANNEL, SHAPE, 2)(told, y).abs().max() < 1e-5
    cost = RatePenalty(CHANNEL, SHAPE, 2)(vectors(4096), torch.zeros(4096, dtype=torch.long)).mean().item()
    assert 0.8 * CHANNEL.bits_per_image < cost / math.log(2) <= CHANNEL.bits_per_image * 1.01


def test_its_gradient_pulls_each_feature_towards_its_class():
    s, y = vectors(64).requires_grad_(), torch.arange(64) % 2
    RatePenalty(CHANNEL, SHAPE, 2)(s, y).sum().backward()
    for k in range(2):
        rows = s.detach()[y == k]
        pull = -s.grad[y == k]
        assert ((rows.mean(0) - rows) * pull).flatten(1).sum(1).min() >= 0


def test_moments_remember_earlier_batches_and_classes_that_a_batch_lacks():
    penalty, zeros = RatePenalty(CHANNEL, SHAPE, 2), torch.zeros(8, dtype=torch.long)
    one, two = vectors(8, 1), vectors(8, 2)
    penalty(one, zeros)
    penalty(two, zeros)
    kept = penalty.state_dict()
    torch.testing.assert_close(kept["mean"][0], MEMORY * one.mean(0) + (1 - MEMORY) * two.mean(0))
    assert kept["seen"].tolist() == [True, False]
    penalty(one, zeros + 1)
    torch.testing.assert_close(penalty.state_dict()["mean"][0], kept["mean"][0])
    torch.testing.assert_close(penalty.state_dict()["mean"][1], one.mean(0))


def test_it_goes_on_from_its_state():
    straight, resumed = (RatePenalty(CHANNEL, SHAPE, 2) for _ in range(2))
    y = torch.arange(8) % 2
    straight(vectors(8, 1), y)
    resumed.load_state_dict(straight.state_dict())
    assert torch.equal(straight(vectors(8, 2), y), resumed(vectors(8, 2), y))


@pytest.mark.parametrize("cells", [4, 9])
def test_cells_add_up(cells):
    side = math.isqrt(cells)
    channel = ChannelConfig(dimensions=4, noise=0.5, cells=cells)
    s = vectors(32).expand(32, 4, side, side)
    y = torch.zeros(32, dtype=torch.long)
    one = RatePenalty(CHANNEL, SHAPE, 1)(vectors(32), y)
    torch.testing.assert_close(RatePenalty(channel, (4, side, side), 1)(s, y), cells * one, rtol=1e-4, atol=1e-4)
