"""Batches are functions of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.sampling import PoissonBatches, ShuffledBatches, derive_seed


@given(n=st.integers(1, 200), batch=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_an_epoch_of_shuffled_batches_holds_every_example_once(n, batch, seed):
    sampler = ShuffledBatches(n, batch_size=batch, seed=seed)
    epoch = [sampler.ids(step) for step in range(sampler.steps_per_epoch)]
    assert sorted(np.concatenate(epoch)) == list(range(n))


@given(step=st.integers(0, 1000))
def test_asking_again_gives_the_same_batch(step):
    for kind in (ShuffledBatches, PoissonBatches):
        first, again = kind(100, batch_size=10, seed=3), kind(100, batch_size=10, seed=3)
        assert np.array_equal(first.ids(step), again.ids(step))


def test_epochs_are_shuffled_differently():
    sampler = ShuffledBatches(64, batch_size=64, seed=0)
    assert not np.array_equal(sampler.ids(0), sampler.ids(1))


def test_poisson_batches_have_the_binomial_size_and_include_each_example_alike():
    sampler = PoissonBatches(50, batch_size=5, seed=1)
    batches = [sampler.ids(step) for step in range(4000)]
    sizes = np.array([len(b) for b in batches])
    # Binomial(50, 0.1): mean 5, variance 4.5; standard error of the mean over 4000 batches is 0.034.
    assert abs(sizes.mean() - 5) < 0.15
    assert abs(sizes.var() - 4.5) < 0.5
    counts = np.bincount(np.concatenate(batches), minlength=50) / 4000
    assert np.abs(counts - 0.1).max() < 5 * np.sqrt(0.09 / 4000)


def test_poisson_batches_can_be_empty():
    sampler = PoissonBatches(20, batch_size=1, seed=0)
    assert any(len(sampler.ids(step)) == 0 for step in range(50))


def test_a_poisson_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="larger than the training subset"):
        PoissonBatches(10, batch_size=11, seed=0)


def test_seeds_for_different_purposes_differ_and_do_not_depend_on_order():
    seeds = {derive_seed(0, "module", t) for t in ("a", "b")} | {
        derive_seed(0, "head", "a"),
        derive_seed(1, "module", "a"),
    }
    assert len(seeds) == 4
    assert derive_seed(0, "x", 1) == derive_seed(0, "x", 1)
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")
