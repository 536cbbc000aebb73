"""The lower bound on epsilon from an attack's scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from orchestrator.errors import ConfigError
from orchestrator.evaluation.audit.bound import epsilon_lower_bound, largest_bound
from orchestrator.evaluation.floors import clopper_pearson


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Of one Gaussian mechanism of sensitivity mu and unit noise (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        spent = norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)
        low, high = (e, high) if spent > delta else (low, e)
    return high


def test_the_interval_is_that_of_clopper_and_pearson():
    """Of 0 out of n, the upper end is 1 - (tail)^(1/n); of 3 out of 10, the published table has (0.067, 0.652)."""
    assert clopper_pearson(0, 500) == (0.0, pytest.approx(1 - 0.025 ** (1 / 500)))
    assert clopper_pearson(3, 10) == (pytest.approx(0.0667, abs=1e-4), pytest.approx(0.6525, abs=1e-4))


def test_an_attack_that_is_never_wrong_shows_the_most_that_so_many_runs_can():
    """ln((a - delta) / (1 - a)) with a = 0.025^(1/500), of 1000 runs of which 500 measure."""
    a = 0.025 ** (1 / 500)
    bound = epsilon_lower_bound(np.ones(1000), np.zeros(1000), delta=0.01, confidence=0.95)
    assert bound.epsilon == pytest.approx(math.log((a - 0.01) / (1 - a)))
    assert (
        bound.epsilon
        == pytest.approx(largest_bound(1000, delta=0.01, confidence=0.95))
        == pytest.approx(4.896, abs=1e-3)
    )
    assert (bound.tpr, bound.fpr, bound.runs) == (1.0, 0.0, 500)


def test_one_out_of_which_the_rates_are_known_gives_the_textbook_number():
    """200 of 250 true and 25 of 250 false positives; the intervals' ends are scipy's, computed apart."""
    half_in, half_out = np.repeat([1.0, 0.0], [200, 50]), np.repeat([1.0, 0.0], [25, 225])
    bound = epsilon_lower_bound(np.tile(half_in, 2), np.tile(half_out, 2), delta=1e-3, confidence=0.95)
    low, high = clopper_pearson(200, 250)[0], clopper_pearson(25, 250)[1]
    expected = max(math.log((low - 1e-3) / high), math.log((1 - high - 1e-3) / (1 - low)))
    assert bound.epsilon == pytest.approx(expected)
    assert (bound.tpr, bound.fpr) == (0.8, 0.1)


def test_the_other_side_counts_where_it_shows_more():
    """Half of the members are surely members: few false negatives say nothing here, few false positives a lot; and so
    the other way round, when half of the others surely are none."""
    sure, torn = np.tile([1.0, 0.0], 400), np.zeros(800)
    one = epsilon_lower_bound(sure, torn, delta=1e-3, confidence=0.95)
    other = epsilon_lower_bound(-torn, -sure, delta=1e-3, confidence=0.95)
    assert one.epsilon == pytest.approx(other.epsilon)
    assert one.epsilon > 3


def test_scores_that_tell_nothing_show_nothing():
    rng = np.random.default_rng(0)
    assert epsilon_lower_bound(np.zeros(400), np.zeros(400), delta=1e-5, confidence=0.95).epsilon == 0.0
    noise = [epsilon_lower_bound(*rng.normal(size=(2, 400)), delta=1e-5, confidence=0.95).epsilon for _ in range(40)]
    assert max(noise) == 0.0


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_of_a_gaussian_mechanism_the_bound_is_below_its_epsilon_and_not_far_with_many_runs(mu):
    rng, delta = np.random.default_rng(1), 1e-3
    true = gaussian_epsilon(mu, delta)
    bounds = [
        epsilon_lower_bound(mu + rng.normal(size=2000), rng.normal(size=2000), delta=delta, confidence=0.95).epsilon
        for _ in range(20)
    ]
    assert max(bounds) < true
    assert np.median(bounds) > 0.3 * true


def test_the_confidence_is_kept_where_the_bound_is_as_tight_as_can_be():
    """Randomised response of epsilon 1 (delta 0), whose best attack is its answer: at most 5 % of bounds are over."""
    rng, truth = np.random.default_rng(2), math.e / (1 + math.e)
    over = sum(
        epsilon_lower_bound(
            (rng.random(300) < truth).astype(float), (rng.random(300) > truth).astype(float), delta=0.0, confidence=0.95
        ).epsilon
        > 1.0
        for _ in range(200)
    )
    assert over <= 10


def test_the_runs_that_choose_the_threshold_do_not_measure_it():
    """The first half tells the two apart; the second does not, and nothing is shown."""
    with_example = np.concatenate([np.ones(200), np.zeros(200)])
    assert epsilon_lower_bound(with_example, np.zeros(400), delta=1e-3, confidence=0.95).epsilon == 0.0


def test_scores_that_are_no_numbers_or_not_as_many_are_refused():
    with pytest.raises(ConfigError, match="not a number"):
        epsilon_lower_bound(np.array([1.0, math.nan]), np.zeros(2), delta=1e-3, confidence=0.95)
    with pytest.raises(ConfigError, match="as many runs"):
        epsilon_lower_bound(np.ones(4), np.zeros(2), delta=1e-3, confidence=0.95)
