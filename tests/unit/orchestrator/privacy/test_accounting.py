"""Published numbers: MetaMorphosis's two trainings (C = 1.2, batch 64, epsilon 4), computed once with Opacus 1.6.0."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
import warnings

import pytest

from orchestrator.errors import CheckpointError, ConfigError, UnknownNameError
from orchestrator.privacy import accounting
from orchestrator.privacy.accounting import Accountant, epsilon_of, noise_multiplier

# name: images, steps, delta, sample rate, sigma by RDP, sigma by PRV
STATEFARM = (5604, 1e-5, 64 / 17934, 0.7062, 0.6714)
STATEFARM_LOADER = (5620, 1e-5, 1 / 281, 0.7056, 0.6708)
STATEFARM_FIG8 = (5604, 1e-4, 64 / 17934, 0.6677, 0.6335)
CELEBA = (25312, 1e-6, 64 / 162000, 0.5521, 0.5179)
CELEBA_LOADER = (25320, 1e-6, 1 / 2532, 0.5518, 0.5179)
ROWS = (STATEFARM, STATEFARM_LOADER, STATEFARM_FIG8, CELEBA, CELEBA_LOADER)


@pytest.mark.parametrize("row", ROWS)
def test_the_published_noise_costs_epsilon_4_by_both_accountants(row):
    steps, delta, q, sigma_rdp, sigma_prv = row
    for accountant, sigma in (("rdp", sigma_rdp), ("prv", sigma_prv)):
        spent = epsilon_of(noise_multiplier=sigma, delta=delta, sample_rate=q, steps=steps, accountant=accountant)
        assert spent == pytest.approx(4.0, abs=0.011)


@pytest.mark.parametrize("row", ROWS)
def test_calibrating_by_rdp_gives_the_published_noise_to_four_digits(row):
    steps, delta, q, sigma_rdp, _ = row
    sigma = noise_multiplier(epsilon=4.0, delta=delta, sample_rate=q, steps=steps, accountant="rdp")
    assert round(sigma, 4) == sigma_rdp


@pytest.mark.parametrize(
    "row",
    [
        STATEFARM,
        pytest.param(STATEFARM_LOADER, marks=pytest.mark.slow),
        pytest.param(STATEFARM_FIG8, marks=pytest.mark.slow),
        pytest.param(CELEBA, marks=pytest.mark.slow),
        pytest.param(CELEBA_LOADER, marks=pytest.mark.slow),
    ],
)
def test_calibrating_by_prv_gives_the_published_noise_to_four_digits(row):
    steps, delta, q, _, sigma_prv = row
    assert round(noise_multiplier(epsilon=4.0, delta=delta, sample_rate=q, steps=steps), 4) == sigma_prv


FIG7 = {
    "statefarm": (2.070, 1.235, 0.852, 0.735, 0.671, 0.597, 0.552, 0.519),
    "celeba": (0.830, 0.691, 0.606, 0.555, 0.518, 0.468, 0.435, 0.412),
}


@pytest.mark.parametrize("epsilon", [0.5, 1, 2, 3, 4, 6, 8, 10])
@pytest.mark.parametrize("setting", [STATEFARM, pytest.param(CELEBA, marks=pytest.mark.slow)])
def test_the_sweep_of_figure_7_is_reproduced_by_prv(setting, epsilon):
    steps, delta, q, _, _ = setting
    sigmas = FIG7["statefarm" if setting is STATEFARM else "celeba"]
    sigma = sigmas[(0.5, 1, 2, 3, 4, 6, 8, 10).index(epsilon)]
    spent = epsilon_of(noise_multiplier=sigma, delta=delta, sample_rate=q, steps=steps)
    # three digits of sigma are good for half a per cent of epsilon
    assert spent == pytest.approx(epsilon, abs=0.01 + 0.005 * epsilon)


@pytest.mark.parametrize(("row", "by_rdp", "by_prv"), [(STATEFARM, 5.27, 5.47), (CELEBA, 4.44, 4.62)])
def test_two_phases_on_the_same_images_cost_more_than_one(row, by_rdp, by_prv):
    steps, delta, q, sigma_rdp, sigma_prv = row
    for kind, sigma, expected in (("rdp", sigma_rdp, by_rdp), ("prv", sigma_prv, by_prv)):
        accountant = Accountant(kind)
        accountant.load_state_dict({**accountant.state_dict(), "history": [[sigma, q, 2 * steps]]})
        assert accountant.epsilon(delta) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("row", "kind", "sigma"),
    [
        (STATEFARM, "rdp", 0.777),
        pytest.param(STATEFARM, "prv", 0.746, marks=pytest.mark.slow),
        (CELEBA, "rdp", 0.5685),
        pytest.param(CELEBA, "prv", 0.5362, marks=pytest.mark.slow),
    ],
)
def test_one_noise_for_two_phases_costs_the_total_that_was_asked_for(row, kind, sigma):
    steps, delta, q, *_ = row
    setting = {"delta": delta, "sample_rate": q, "steps": steps, "accountant": kind}
    found = noise_multiplier(epsilon=4.0, alike=((q, steps),), **setting)
    assert found == pytest.approx(sigma, abs=1e-3)
    both = Accountant.of(kind, ((found, q, steps),), ((found, q, steps),))
    assert both.history == ((found, q, 2 * steps),)
    assert 3.98 <= both.epsilon(delta) <= 4.0


def test_what_was_spent_before_leaves_less_for_a_training():
    steps, delta, q, sigma, _ = STATEFARM
    before = ((1.5, q, steps),)
    later = noise_multiplier(epsilon=4.0, delta=delta, sample_rate=q, steps=steps, accountant="rdp", before=before)
    assert later > sigma
    assert 3.98 <= Accountant.of("rdp", before, ((later, q, steps),)).epsilon(delta) <= 4.0
    with pytest.raises(ConfigError, match=r"after trainings that cost 4\.00 already"):
        noise_multiplier(
            epsilon=2.0, delta=delta, sample_rate=q, steps=steps, accountant="rdp", before=((sigma, q, steps),)
        )


def test_clipping_two_parts_apart_costs_what_the_smaller_effective_noise_costs():
    steps, delta, q, sigma_rdp, _ = STATEFARM
    spent = epsilon_of(
        noise_multiplier=sigma_rdp / math.sqrt(2), delta=delta, sample_rate=q, steps=steps, accountant="rdp"
    )
    assert spent == pytest.approx(13.3, abs=0.02)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_one_gaussian_release_costs_at_least_its_exact_epsilon_and_little_more(accountant):
    # Balle and Wang 2018, theorem 8, for sensitivity 1, sigma 1, delta 1e-5, solved to five digits.
    def delta_of(epsilon, sigma=1.0):
        phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
        return phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)

    spent = epsilon_of(noise_multiplier=1.0, delta=1e-5, sample_rate=1.0, steps=1, accountant=accountant)
    assert delta_of(spent) <= 1e-5
    assert delta_of(spent - (0.05 if accountant == "prv" else 0.5)) > 1e-5


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("epsilon", [0.3, 2.0, 20.0])
def test_calibrated_noise_never_costs_more_than_was_asked_and_wastes_little(accountant, epsilon):
    setting = {"delta": 1e-5, "sample_rate": 0.02, "steps": 200, "accountant": accountant}
    spent = epsilon_of(noise_multiplier=noise_multiplier(epsilon=epsilon, **setting), **setting)
    assert epsilon - 0.01 * min(1, epsilon) <= spent <= epsilon


def test_more_steps_and_less_noise_cost_more():
    def spent(sigma, steps):
        return epsilon_of(noise_multiplier=sigma, delta=1e-5, sample_rate=0.01, steps=steps, accountant="rdp")

    assert 0 == spent(1, 0) < spent(1, 10) < spent(1, 100) < spent(0.8, 100)


def test_without_noise_there_is_no_finite_epsilon():
    for accountant in ("rdp", "prv"):
        setting = {"delta": 1e-5, "sample_rate": 0.01, "steps": 1, "accountant": accountant}
        assert epsilon_of(noise_multiplier=0.0, **setting) == math.inf


@pytest.mark.parametrize(("sigma", "q"), [(0.05, 0.5), (60.0, 1e-3), (1e3, 1.0)])
def test_extreme_budgets_are_bounds_and_warn_of_nothing(sigma, q):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spent = {
            kind: epsilon_of(noise_multiplier=sigma, delta=1e-5, sample_rate=q, steps=10, accountant=kind)
            for kind in ("rdp", "prv")
        }
    assert all(0 <= value < math.inf for value in spent.values())
    assert spent["prv"] <= spent["rdp"]


def test_an_epsilon_that_no_noise_reaches_is_refused_with_advice():
    with pytest.raises(ConfigError, match=r"no noise reaches epsilon 0\.001 .*; raise epsilon"):
        noise_multiplier(epsilon=0.001, delta=1e-5, sample_rate=0.01, steps=100)


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"steps": 0},
    ],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        noise_multiplier(**{"epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 10, **bad})


def test_an_unknown_accountant_is_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="known: prv, rdp"):
        Accountant("gdp")


def test_an_accountant_that_was_stepped_knows_what_the_formula_says():
    accountant = Accountant("prv")
    assert accountant.epsilon(1e-5) == accountant.epsilon_upper(1e-5) == 0.0
    for _ in range(30):
        accountant.step(noise_multiplier=0.9, sample_rate=0.05)
    setting = {"noise_multiplier": 0.9, "delta": 1e-5, "sample_rate": 0.05, "steps": 30}
    assert accountant.steps == 30
    assert accountant.history == ((0.9, 0.05, 30),)
    assert accountant.epsilon(1e-5) == epsilon_of(**setting, accountant="prv")
    assert accountant.epsilon_upper(1e-5) == epsilon_of(**setting, accountant="rdp")
    assert accountant.epsilon(1e-5) < accountant.epsilon_upper(1e-5)


def test_steps_of_different_kinds_add_up():
    mixed, one = Accountant("rdp"), Accountant("rdp")
    for sigma in (1.0, 1.0, 2.0):
        mixed.step(noise_multiplier=sigma, sample_rate=0.1)
    for _ in range(2):
        one.step(noise_multiplier=1.0, sample_rate=0.1)
    assert mixed.history == ((1.0, 0.1, 2), (2.0, 0.1, 1))
    assert mixed.epsilon(1e-5) > one.epsilon(1e-5)


def test_progress_can_be_asked_for_after_every_step():
    accountant = Accountant("prv")
    accountant.step(noise_multiplier=0.7, sample_rate=0.01)
    accountant.epsilon_upper(1e-5)
    start = time.perf_counter()
    for _ in range(1000):
        accountant.step(noise_multiplier=0.7, sample_rate=0.01)
        accountant.epsilon_upper(1e-5)
    assert time.perf_counter() - start < 1.0


def test_epsilon_is_computed_once_per_number_of_steps(monkeypatch):
    calls = []

    def counted(history, delta):
        calls.append(history)
        return 1.0

    monkeypatch.setitem(accounting.ACCOUNTANTS, "prv", counted)
    accountant = Accountant("prv")
    for _ in range(3):
        accountant.step(noise_multiplier=0.123, sample_rate=0.0456)
        assert [accountant.epsilon(1e-5) for _ in range(5)] == [1.0] * 5
    accounting._epsilon.cache_clear()
    assert len(calls) == 3


def test_a_saved_accountant_goes_on_where_it_stopped():
    first, second = Accountant("rdp"), Accountant("rdp")
    first.step(noise_multiplier=1.0, sample_rate=0.1)
    first.step(noise_multiplier=2.0, sample_rate=0.1)
    second.load_state_dict(first.state_dict())
    for accountant in (first, second):
        accountant.step(noise_multiplier=2.0, sample_rate=0.1)
    assert second.history == first.history == ((1.0, 0.1, 1), (2.0, 0.1, 2))
    assert second.epsilon(1e-5) == first.epsilon(1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        {"accountant": "prv"},
        {"kind": "feature_cache"},
        {"version": 2},
        {"history": [[1.0, 0.1]]},
        {"history": [[1.0, 0.1, 0]]},
        {"history": [[-1.0, 0.1, 5]]},
        {"history": [[1.0, "many", 5]]},
        {"history": [[1.0, 0.1, 5], [1.0, 0.1, 5]]},
        {"history": None},
    ],
)
def test_a_foreign_or_damaged_state_is_refused_and_nothing_is_forgotten(damage):
    accountant = Accountant("rdp")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(CheckpointError):
        accountant.load_state_dict({**accountant.state_dict(), **damage})
    assert accountant.steps == 1


def test_loading_opacus_leaves_the_logging_of_the_process_alone():
    code = (
        "import logging; from orchestrator.privacy.accounting import load_opacus; load_opacus(); "
        "import opacus; assert logging.getLogger().handlers == [], logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not any(type(handler) is logging.NullHandler for handler in logging.getLogger().handlers)
