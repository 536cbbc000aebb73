"""The measured rate: above the true information, by little where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.errors import ConfigError, DataError
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.rate import MixturePrior, rate_bound


def sphere(
    rng: np.random.Generator, n: int, d: int, centres: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of power d around the centres, and which centre."""
    centres = rng.normal(size=(3, d)) if centres is None else centres
    y = rng.integers(0, len(centres), n)
    v = centres[y] + 0.4 * rng.normal(size=(n, d))
    return v * math.sqrt(d) / np.linalg.norm(v, axis=1, keepdims=True), y


@pytest.mark.parametrize(("power", "tau"), [(1.0, 0.5), (1.0, 1.0), (0.2, 2.0)])
def test_the_rate_of_a_gaussian_input_is_its_information(power, tau):
    rng = np.random.default_rng(0)
    train, test = math.sqrt(power) * rng.normal(size=(20_000, 1)), math.sqrt(power) * rng.normal(size=(20_000, 1))
    bound = rate_bound(test, tau, MixturePrior.fit(train, np.zeros(20_000, dtype=np.int64), tau=tau))
    truth = 0.5 * math.log2(1 + power / tau**2)
    assert bound.low < truth + 1e-3 < bound.high + 2e-3
    assert bound.bits == pytest.approx(truth, abs=0.02)
    assert bound.n == 20_000


def test_the_rate_of_two_opposite_vectors_is_the_label():
    """s = +-1 by the class, far apart: z tells the class, one bit, and each component of the prior is exact."""
    s = np.repeat([[1.0], [-1.0]], 500, axis=0)
    prior = MixturePrior.fit(s, (s[:, 0] > 0).astype(np.int64), tau=0.05)
    bound = rate_bound(s, 0.05, prior)
    assert (bound.low, bound.bits, bound.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert bound.bits < ChannelConfig(dimensions=1, noise=0.05).bits_per_cell / 4


def test_a_mixture_by_class_is_tighter_than_one_gaussian_and_than_capacity():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8)) * 3
    (train, y), (test, _) = sphere(rng, 3000, 8, centres), sphere(rng, 3000, 8, centres)
    by_class = rate_bound(test, 0.5, MixturePrior.fit(train, y, tau=0.5))
    as_one = rate_bound(test, 0.5, MixturePrior.fit(train, np.zeros_like(y), tau=0.5))
    assert by_class.high < as_one.low
    assert by_class.high < ChannelConfig(dimensions=8, noise=0.5).bits_per_image
    assert "held-out" in by_class.assumption


def test_a_density_of_its_own_for_each_cell_is_tighter_and_still_above_the_truth():
    """Two cells, each sure of itself: 0 bits, which a density that both share cannot see."""
    s = np.tile(np.array([[1.0, -1.0]])[:, None], (500, 2, 1)).reshape(500, 2, 1, 2)
    y = np.zeros(500, dtype=np.int64)
    each = [MixturePrior.fit(s[..., 0, cell], y, tau=0.5) for cell in range(2)]
    shared = MixturePrior.fit(np.concatenate([s[..., 0, 0], s[..., 0, 1]]), np.zeros(1000, dtype=np.int64), tau=0.5)
    assert rate_bound(s, 0.5, each).bits == pytest.approx(0.0, abs=1e-6)
    assert rate_bound(s, 0.5, shared).bits > 1
    with pytest.raises(DataError, match="3 priors for 2 cells"):
        rate_bound(s, 0.5, [*each, each[0]])


@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_the_closed_form_is_above_the_divergence_to_the_mixture(tau):
    """-log sum pi exp(-KL) against the divergence itself, by 200,000 draws."""
    rng = np.random.default_rng(3)
    train, y = sphere(rng, 300, 3)
    prior = MixturePrior.fit(train, y, tau=tau)
    for s in sphere(rng, 5, 3)[0]:
        z = s + tau * rng.normal(size=(200_000, 3))
        own = -((z - s) ** 2).sum(1) / (2 * tau**2) - 3 * math.log(tau)
        parts = []
        for weight, mean, covariance in zip(prior.weights_K, prior.means_KD, prior.covariances_KDD, strict=True):
            distance = np.einsum("nd,de,ne->n", z - mean, np.linalg.inv(covariance), z - mean)
            parts.append(np.log(weight) - distance / 2 - np.linalg.slogdet(covariance)[1] / 2)
        differences = (own - np.logaddexp.reduce(parts, axis=0)) / math.log(2)
        error = differences.std() / math.sqrt(len(z))
        upper = float(prior.kl_bits(s[None], tau)[0])
        assert differences.mean() - 5 * error <= upper
        assert upper < differences.mean() + 1.6, "and is no more than log2 of the number of classes above"


def test_with_one_component_the_closed_form_is_the_divergence():
    prior = MixturePrior(
        weights_K=np.ones(1), means_KD=np.array([[1.0, -1.0]]), covariances_KDD=np.array([[[2.0, 0.5], [0.5, 1.0]]])
    )
    s, tau = np.array([[0.3, 0.2]]), 0.7
    inverse = np.linalg.inv(prior.covariances_KDD[0])
    diff = s[0] - prior.means_KD[0]
    kl = 0.5 * (
        np.trace(inverse) * tau**2
        + diff @ inverse @ diff
        - 2
        + math.log(np.linalg.det(prior.covariances_KDD[0]) / tau**4)
    )
    assert prior.kl_bits(s, tau)[0] == pytest.approx(kl / math.log(2), rel=1e-12)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(3, 4))
    train, y = sphere(rng, 500, 4, centres)
    prior = MixturePrior.fit(train, y, tau=0.5)
    truth = rate_bound(sphere(rng, 200_000, 4, centres)[0], 0.5, prior).bits
    bounds = [rate_bound(sphere(rng, 200, 4, centres)[0], 0.5, prior) for _ in range(400)]
    covered = sum(bound.low <= truth <= bound.high for bound in bounds)
    assert 0.91 <= covered / 400 <= 0.985


def test_the_cells_of_a_map_are_summed():
    rng = np.random.default_rng(0)
    s, y = sphere(rng, 60, 4)
    prior = MixturePrior.fit(s, y, tau=0.5)
    maps = s.reshape(10, 2, 3, 4).transpose(0, 3, 1, 2)
    cells, images = rate_bound(s, 0.5, prior), rate_bound(maps, 0.5, prior)
    assert images.n == 10
    assert images.bits == pytest.approx(6 * cells.bits)


def test_a_class_of_one_image_has_the_noise_for_its_width():
    prior = MixturePrior.fit(np.array([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]]), np.array([0, 1, 1]), tau=0.5)
    assert np.allclose(prior.covariances_KDD[0], 0.25 * np.eye(2))
    assert prior.weights_K == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("s", "y"),
    [
        (np.zeros((3, 2)), np.zeros(2, dtype=np.int64)),
        (np.zeros(3), np.zeros(3, dtype=np.int64)),
        (np.full((3, 2), np.nan), np.zeros(3, dtype=np.int64)),
        (np.zeros((0, 2)), np.zeros(0, dtype=np.int64)),
    ],
)
def test_a_prior_of_what_is_no_data_is_refused(s, y):
    with pytest.raises(DataError, match=r"\(N, D\)"):
        MixturePrior.fit(s, y, tau=0.5)


@pytest.mark.parametrize("s", [np.zeros((1, 2)), np.zeros((4, 3)), np.full((4, 2), np.inf), np.zeros((4, 2, 2))])
def test_a_rate_of_what_is_no_data_is_refused(s):
    prior = MixturePrior.fit(np.eye(2), np.zeros(2, dtype=np.int64), tau=0.5)
    with pytest.raises(DataError, match="at least 2"):
        rate_bound(s, 0.5, prior)
    with pytest.raises(ConfigError, match="noise"):
        rate_bound(np.zeros((4, 2)), 0.0, prior)
