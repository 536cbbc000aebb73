"""Bounds on attackers: no channel that can be written down beats them, and known numbers are met."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from orchestrator.errors import ConfigError
from orchestrator.privacy.accounting import epsilon_of
from orchestrator.privacy.bounded.bounds import (
    accuracy_bound,
    accuracy_bound_given_task,
    bits_needed,
    capacity_bound,
    fano_accuracy_bound,
    gaussian_epsilon,
    guessing_accuracy_bound,
    left_for_secret,
    local_dp_epsilon,
    rate_distortion_accuracy_bound,
)
from orchestrator.privacy.bounded.channel import ChannelConfig

priors = st.lists(st.floats(1e-3, 1), min_size=2, max_size=8).map(lambda w: [p / sum(w) for p in w])
SLACK = 1e-7
"""Where the bounds are flat, a double resolves an accuracy no better."""


def information(joint: np.ndarray) -> float:
    """I of the two axes, in bits."""
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    inside = joint > 1e-200
    return max(0.0, float((joint[inside] * np.log2(joint[inside] / product[inside])).sum()))


def joints(rng: np.random.Generator, n: int):
    """Random joint distributions of a secret and a release, from independent to nearly one-to-one."""
    for _ in range(n):
        s, z = rng.integers(2, 5, 2)
        concentration = 10.0 ** rng.uniform(-2, 1.5)
        joint = rng.dirichlet(np.full(s * z, concentration)).reshape(s, z)
        yield joint / joint.sum()


def test_no_attacker_of_a_small_channel_passes_any_of_the_bounds():
    for joint in joints(np.random.default_rng(0), 2000):
        prior, bits = joint.sum(1), information(joint)
        accuracy = joint.max(0).sum()  # Bayes: the best there is
        assert accuracy <= fano_accuracy_bound(bits, prior) + SLACK
        assert accuracy <= guessing_accuracy_bound(bits, prior.max()) + SLACK
        assert accuracy <= rate_distortion_accuracy_bound(bits, prior) + SLACK
        assert accuracy <= accuracy_bound(bits, prior).accuracy + SLACK


def test_the_bounds_would_notice_a_tenth_of_the_bits_gone():
    """The enumeration above is a test only if it comes near: some channels meet the bound."""
    passed = sum(
        joint.max(0).sum() > accuracy_bound(0.9 * information(joint), joint.sum(1)).accuracy + SLACK
        for joint in joints(np.random.default_rng(0), 2000)
    )
    assert passed > 20


@settings(deadline=None)
@given(prior=priors, bits=st.lists(st.floats(0, 4), min_size=2, max_size=6))
def test_more_bits_never_lower_a_bound_and_all_lie_between_the_largest_prior_and_one(prior, bits):
    for bound in (
        fano_accuracy_bound,
        rate_distortion_accuracy_bound,
        lambda b, p: guessing_accuracy_bound(b, max(p)),
        lambda b, p: accuracy_bound(b, p).accuracy,
    ):
        values = [bound(b, prior) for b in sorted(bits)]
        assert all(max(prior) - SLACK <= value <= 1 for value in values)
        assert all(b >= a - SLACK for a, b in pairwise(values))


@settings(deadline=None)
@given(prior=priors, bits=st.floats(0, 4))
def test_rate_distortion_is_the_sharpest(prior, bits):
    sharpest = rate_distortion_accuracy_bound(bits, prior)
    assert sharpest <= fano_accuracy_bound(bits, prior) + SLACK
    assert sharpest <= guessing_accuracy_bound(bits, max(prior)) + SLACK


@settings(deadline=None)
@given(prior=priors)
def test_without_bits_nothing_beats_the_most_frequent_class(prior):
    assert accuracy_bound(0.0, prior).accuracy == pytest.approx(max(prior), abs=SLACK)
    assert guessing_accuracy_bound(0.0, max(prior)) == pytest.approx(max(prior), abs=SLACK)


def test_fano_alone_is_loose_for_an_uneven_prior_and_without_bits():
    assert fano_accuracy_bound(0.0, [0.6, 0.3, 0.1]) > 0.64
    assert accuracy_bound(0.0, [0.6, 0.3, 0.1]).accuracy == pytest.approx(0.6, abs=SLACK)


def test_for_a_uniform_prior_all_are_fanos():
    prior = [1 / 20] * 20
    bound = accuracy_bound(2.0, prior)
    assert bound.method == "fano"
    assert bound.accuracy == pytest.approx(guessing_accuracy_bound(2.0, 1 / 20), abs=SLACK)
    assert bound.accuracy == pytest.approx(rate_distortion_accuracy_bound(2.0, prior), abs=SLACK)
    # The textbook's form is looser: P_err >= (H - I - 1) / log2(M - 1).
    assert bound.accuracy < 1 - (math.log2(20) - 2 - 1) / math.log2(19)


@pytest.mark.parametrize(("bits", "accuracy"), [(1 - 0.5, 0.8900), (1.0, 1.0), (0.0, 0.5)])
def test_of_an_even_binary_secret_half_a_bit_allows_89_percent(bits, accuracy):
    """H_b(.11) = .4999: the textbook's number."""
    assert accuracy_bound(bits, [0.5, 0.5]).accuracy == pytest.approx(accuracy, abs=1e-4)


def test_as_many_bits_as_the_secret_has_forbid_nothing():
    prior = [0.7, 0.2, 0.1]
    entropy = -sum(p * math.log2(p) for p in prior)
    assert accuracy_bound(entropy, prior).accuracy == 1
    assert accuracy_bound(entropy - 0.01, prior).accuracy < 1
    assert accuracy_bound(math.inf, prior).accuracy == 1


def test_a_class_that_never_occurs_changes_nothing():
    assert accuracy_bound(0.5, [0.5, 0.3, 0.2, 0.0]) == accuracy_bound(0.5, [0.3, 0.2, 0.5])
    assert accuracy_bound(0.0, [0.0, 1.0]).accuracy == 1


def blahut_arimoto(prior: np.ndarray, slope: float) -> tuple[float, float]:
    """(accuracy, bits) of one point of the rate-distortion function under Hamming distortion, by iteration."""
    kernel = np.exp(slope * np.eye(len(prior)))
    output = np.full(len(prior), 1 / len(prior))
    for _ in range(20_000):
        channel = output * kernel
        channel /= channel.sum(1, keepdims=True)
        output = prior @ channel
    joint = prior[:, None] * channel
    return float(np.trace(joint)), information(joint)


@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.9, 0.1], [0.5, 0.3, 0.15, 0.05], [0.25] * 4])
@pytest.mark.parametrize("slope", [0.5, 1.5, 3.0, 5.0])
def test_the_bits_that_an_accuracy_needs_are_those_of_blahut_and_arimoto(prior, slope):
    accuracy, bits = blahut_arimoto(np.array(prior), slope)
    assert bits_needed(accuracy, prior) == pytest.approx(bits, abs=1e-3)
    if bits > 1e-3:
        assert rate_distortion_accuracy_bound(bits, prior) == pytest.approx(accuracy, abs=1e-3)


@settings(deadline=None)
@given(prior=priors)
def test_an_accuracy_needs_no_bits_up_to_the_prior_and_all_of_them_for_certainty(prior):
    assert bits_needed(max(prior) * (1 - 1e-9), prior) == 0
    assert bits_needed(1.0, prior) == pytest.approx(-sum(p * math.log2(p) for p in prior), abs=1e-9)


def test_beyond_the_task_a_feature_tells_no_more_than_what_is_left():
    """x, y = f(x), S from x, z from x: all distributions random, everything counted out."""
    rng = np.random.default_rng(1)
    binding = 0
    for _ in range(2000):
        n_x, n_y, n_s, n_z = 6, 2, int(rng.integers(2, 4)), int(rng.integers(2, 5))
        p_x = rng.dirichlet(np.ones(n_x))
        y_of_x = np.eye(n_y)[rng.integers(0, n_y, n_x)]
        s_of_x = rng.dirichlet(np.full(n_s, 10.0 ** rng.uniform(-2, 0)), n_x)
        z_of_x = rng.dirichlet(np.full(n_z, 10.0 ** rng.uniform(-2, 1)), n_x)
        p_ysz = np.einsum("x,xy,xs,xz->ysz", p_x, y_of_x, s_of_x, z_of_x)
        total, task = information(p_x[:, None] * z_of_x), information(p_ysz.sum(1))
        beyond = sum(p.sum() * information(p / p.sum()) for p in p_ysz if p.sum() > 0)
        left = left_for_secret(total, task).bits
        assert beyond <= left + 1e-9
        floor, accuracy = p_ysz.sum(2).max(1).sum(), p_ysz.max(1).sum()
        bound = accuracy_bound_given_task(total, task, floor)
        assert accuracy <= bound.accuracy + SLACK
        binding += bound.accuracy < 1
    assert binding > 500


def test_a_task_that_uses_up_its_bits_leaves_none():
    assert left_for_secret(2.0, 2.5).bits == 0
    assert accuracy_bound_given_task(2.0, 2.5, 0.578).accuracy == pytest.approx(0.578, abs=SLACK)


def test_every_bound_says_what_it_assumes():
    channel = ChannelConfig(dimensions=8, noise=0.5)
    assert capacity_bound(channel).bits == channel.bits_per_image
    assert "every distribution" in capacity_bound(channel).assumption
    assert "function of the image" in left_for_secret(3, 1).assumption
    assert "prior" in accuracy_bound(1, [0.5, 0.5]).assumption
    assert "floor" in accuracy_bound_given_task(3, 1, 0.5).assumption


@pytest.mark.parametrize("prior", [[], [0.5, 0.4], [1.5, -0.5], [math.nan, 1.0]])
def test_what_is_no_prior_is_refused(prior):
    with pytest.raises(ConfigError, match="sum to 1"):
        accuracy_bound(1.0, prior)


def test_bits_below_zero_and_accuracies_out_of_range_are_refused():
    for bad in (-0.1, math.nan):
        with pytest.raises(ConfigError, match="bits"):
            accuracy_bound(bad, [0.5, 0.5])
        with pytest.raises(ConfigError, match="bits"):
            left_for_secret(1.0, bad)
        with pytest.raises(ConfigError, match="accuracy"):
            bits_needed(bad, [0.5, 0.5])
        with pytest.raises(ConfigError, match="guess"):
            guessing_accuracy_bound(1.0, bad)


# -- local differential privacy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "noise_over_clip"), [(1, 7.46), (2, 3.99), (4, 2.16), (8, 1.20), (16, 0.69), (32, 0.41)]
)
def test_the_local_epsilon_is_that_of_the_specification(epsilon, noise_over_clip):
    """SPEC D.6: the sensitivity is twice the clipping norm, delta = 1e-5; its noise has two decimals."""
    assert (
        gaussian_epsilon(2, noise_over_clip + 0.005, 1e-5)
        < epsilon
        < gaussian_epsilon(2, noise_over_clip - 0.006, 1e-5)
    )


def test_one_step_of_the_gaussian_mechanism_is_what_prv_says():
    epsilon = gaussian_epsilon(1, 1, 1e-5)
    assert epsilon == pytest.approx(4.377, abs=1e-3)
    assert epsilon <= epsilon_of(noise_multiplier=1, delta=1e-5, sample_rate=1, steps=1) <= epsilon + 0.02


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 5.0, 11.3, 30.0, 100.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_the_epsilon_gives_back_its_delta(ratio, delta):
    """Against the definition, integrated: delta = E_P max(0, 1 - e^(eps - loss)), loss ~ N(r^2/2, r^2) under P."""
    epsilon = gaussian_epsilon(ratio, 1.0, delta)
    if epsilon == 0:
        assert 2 * norm.cdf(ratio / 2) - 1 <= delta
        return
    excess = np.linspace(0, 40 * ratio, 400_001)
    density = norm.pdf(epsilon + excess, ratio**2 / 2, ratio)
    assert np.trapezoid(density * -np.expm1(-excess), excess) == pytest.approx(delta, rel=1e-4)


def test_the_epsilon_of_a_bounded_feature_grows_with_its_size_and_falls_with_noise():
    one = local_dp_epsilon(ChannelConfig(dimensions=8, noise=0.5), 1e-5)
    assert one == pytest.approx(gaussian_epsilon(2 * math.sqrt(8), 0.5, 1e-5))
    assert one > 100
    assert local_dp_epsilon(ChannelConfig(dimensions=2, noise=0.5, cells=4), 1e-5) == pytest.approx(one)
    assert local_dp_epsilon(ChannelConfig(dimensions=8, noise=1.0), 1e-5) < one
    assert math.isfinite(local_dp_epsilon(ChannelConfig(dimensions=64, noise=1e-3, cells=4096), 1e-9))


def test_so_much_noise_that_delta_covers_it_costs_no_epsilon():
    assert gaussian_epsilon(1e-9, 1, 1e-5) == 0
    assert gaussian_epsilon(0, 1, 1e-5) == 0


@pytest.mark.parametrize(("sensitivity", "noise", "delta"), [(-1, 1, 0.1), (1, 0, 0.1), (1, 1, 0), (1, 1, 1)])
def test_a_mechanism_that_cannot_be_is_refused(sensitivity, noise, delta):
    with pytest.raises(ConfigError):
        gaussian_epsilon(sensitivity, noise, delta)
