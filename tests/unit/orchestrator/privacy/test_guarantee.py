from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import get_args

import pytest

from orchestrator.encoder_training import CUT_BEFORE_HEAD
from orchestrator.errors import ConfigError
from orchestrator.privacy.accounting import Accountant, epsilon_of
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.dp import DpConfig, DpMode
from orchestrator.privacy.guarantee import COVERS_ALL, Guarantee, guarantee_for

Q, N, STEPS, SIGMA = 64 / 17934, 17934, 5604, 0.7062


def spent(runs=((SIGMA, Q, STEPS),), kind="rdp"):
    accountant = Accountant(kind)
    accountant.load_state_dict({**accountant.state_dict(), "history": [list(run) for run in runs]})
    return accountant


MODES = get_args(DpMode)


def made(mode="surrogate_then_freeze", **changes):
    public = "digits" if mode == "public_head" else None
    config = DpConfig(epsilon=4.0, dp_mode=mode, accountant="rdp", public_data=public, **changes)
    return guarantee_for(config, accountant=spent(), n_train=N, task_privacy="ssim, omega 0.001")


def test_the_recommended_mode_covers_the_encoder_and_says_what_it_does_not_cover():
    guarantee = made()
    truth = epsilon_of(noise_multiplier=SIGMA, delta=1e-5, sample_rate=Q, steps=STEPS, accountant="rdp")
    assert guarantee.epsilon == truth == pytest.approx(4.0, abs=0.01)
    assert (guarantee.delta, guarantee.steps, guarantee.max_grad_norm) == (1e-5, STEPS, 1.2)
    assert guarantee.nominal_epsilon is None
    text = guarantee.statement()
    for part in (
        "(4.00, 1e-05)-differential privacy for the weights of encoder.",
        "any one of the 17934 training images",
        "The unit is one image, not one person",
        "promises nothing about an image that the model is shown later",
        "Not covered: the weights of metamorphosis modules and heads.",
        "labels",
        "best epoch, early stopping",
        "Accounted by rdp: 5604 steps, noise multiplier 0.7062, sample rate 0.003569, clipping norm 1.2.",
        "Privacy between tasks (ssim, omega 0.001): no guarantee: measured, see evaluate.",
    ):
        assert part in text
    assert guarantee.short() == "epsilon 4.00 at delta 1e-05 per image, for encoder"


def test_whole_model_dp_covers_everything_that_is_published():
    guarantee = made(mode="whole")
    assert "for the weights of encoder, metamorphosis modules and heads." in guarantee.statement()
    assert "Not covered: the weights" not in guarantee.statement()


def test_the_papers_mode_claims_no_epsilon_although_one_was_accounted():
    guarantee = made(mode="encoder_only_paper")
    assert guarantee.epsilon is None
    assert guarantee.covers == ()
    assert guarantee.nominal_epsilon == pytest.approx(4.0, abs=0.01)
    assert guarantee.statement().startswith("Guarantee: none (the head is not private).")
    assert "nominal and no guarantee" in guarantee.statement()
    assert "differential privacy for" not in guarantee.statement()
    assert guarantee.short() == "none (the head is not private); nominal epsilon 3.991"


def test_without_dp_the_statement_says_so():
    guarantee = guarantee_for(DpConfig(), accountant=None, n_train=N)
    assert guarantee.short() == "none: trained without differential privacy"
    assert guarantee.statement() == (
        "Guarantee: none: trained without differential privacy. Nothing is promised about training images, nor about "
        "an image that the model is shown later. Privacy between tasks: none was trained."
    )


@pytest.mark.parametrize(
    ("mode", "covers", "says"),
    [
        ("surrogate_then_freeze", "encoder", "the stand-in was thrown away"),
        ("surrogate_dp_modules", "encoder and metamorphosis modules", "epsilon is for all of it together"),
        ("whole", "encoder, metamorphosis modules and heads", "clipped and noised as one"),
        ("two_budget", "encoder, metamorphosis modules and heads", "clipped and noised apart from the rest"),
        ("public_head", "encoder, metamorphosis modules and heads", "The public images are not protected"),
        ("frozen_head", "encoder, metamorphosis modules and heads", "before the first private image was seen"),
    ],
)
def test_every_valid_mode_says_what_is_covered_how_and_in_which_unit(mode, covers, says):
    text = made(mode=mode).statement()
    for part in (f"for the weights of {covers}.", says, "(4.00, 1e-05)-differential privacy", "The unit is one image"):
        assert part in text


def test_every_mode_has_a_statement():
    valid = {mode for mode in MODES if made(mode=mode).epsilon is not None}
    assert valid == set(MODES) - {"encoder_only_paper"}


@pytest.mark.parametrize("mode", MODES)
def test_no_statement_promises_anything_for_an_image_at_inference(mode):
    assert "shown later" in made(mode=mode).statement()


def test_a_fixed_noise_seed_is_said():
    assert "whoever knows it can take the noise off" in made(noise_seed=1).statement()
    assert "fixed seed" not in made().statement()


def test_a_delta_that_lets_an_image_out_is_said():
    assert "permits publishing a training image outright" in made(delta=1e-4).statement()
    assert "outright" not in made(delta=5e-5).statement()


def test_epsilon_is_never_printed_smaller_than_it_is():
    guarantee = replace(made(), epsilon=4.0001)
    assert "epsilon 4.01 " in guarantee.short()
    assert "(4.01, 1e-05)" in guarantee.statement()


def test_several_runs_are_composed_and_no_single_noise_is_named():
    config = DpConfig(epsilon=4.0, accountant="rdp")
    guarantee = guarantee_for(config, accountant=spent(((0.7, Q, 100), (0.8, Q, 50))), n_train=N)
    assert (guarantee.steps, guarantee.noise_multiplier, guarantee.sample_rate) == (150, None, None)
    assert guarantee.mechanisms == ((0.7, Q, 100), (0.8, Q, 50))
    assert "100 steps, noise multiplier 0.7, sample rate 0.003569 and then 50 steps" in guarantee.statement()
    assert guarantee.epsilon > epsilon_of(noise_multiplier=0.7, delta=1e-5, sample_rate=Q, steps=100, accountant="rdp")


def test_the_modes_that_cover_all_are_those_whose_guarantee_leaves_nothing_out():
    assert {mode for mode in MODES if not made(mode=mode).excludes} == COVERS_ALL
    assert {"whole", "two_budget"} == COVERS_ALL - CUT_BEFORE_HEAD


def test_the_weights_that_were_trained_can_be_named():
    guarantee = guarantee_for(
        DpConfig(epsilon=4.0), accountant=spent(), n_train=N, covers=("encoder", "private branch"), excludes=("heads",)
    )
    assert "for encoder and private branch" in guarantee.short()
    assert "Not covered: the weights of heads." in guarantee.statement()


@pytest.mark.parametrize("accountant", [None, Accountant("prv")])
def test_dp_that_was_asked_for_but_never_accounted_is_refused(accountant):
    with pytest.raises(ConfigError, match="no private step was accounted"):
        guarantee_for(DpConfig(epsilon=4.0), accountant=accountant, n_train=N)


@pytest.mark.parametrize(
    "guarantee",
    [
        made(),
        made(mode="whole", noise_seed=3, delta=1e-4),
        made(mode="encoder_only_paper"),
        guarantee_for(DpConfig(), accountant=None, n_train=5),
    ],
)
def test_json_and_back_is_the_same(guarantee):
    assert Guarantee.from_json(json.loads(json.dumps(guarantee.to_json(), allow_nan=False))) == guarantee


@pytest.mark.parametrize("runs", [[[1.0, 0.1]], [["a", 0.1, 3]], [3]])
def test_json_with_mechanisms_that_are_none_is_refused(runs):
    with pytest.raises(ConfigError, match="noise, rate, steps"):
        Guarantee.from_json({**made().to_json(), "mechanisms": runs})


@pytest.mark.parametrize("key", list(made().to_json()))
def test_json_with_a_key_missing_or_of_the_wrong_type_is_refused(key):
    data = made().to_json()
    with pytest.raises(ConfigError, match=key):
        Guarantee.from_json({name: value for name, value in data.items() if name != key})
    with pytest.raises(ConfigError, match=key):
        Guarantee.from_json({**data, key: {"a": 1}})
    if key != "reproducible_noise":
        with pytest.raises(ConfigError, match=key):
            Guarantee.from_json({**data, key: True})


def test_json_with_an_unknown_key_is_refused_by_name():
    with pytest.raises(ConfigError, match="certified"):
        Guarantee.from_json({**made().to_json(), "certified": True})


@pytest.mark.parametrize(
    "lie",
    [
        {"mode": "encoder_only_paper"},
        {"mode": "none"},
        {"mode": "partial"},
        {"epsilon": None},
        {"covers": ()},
        {"delta": None},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
    ],
)
def test_a_claim_that_its_mode_does_not_bear_out_cannot_be_made(lie):
    with pytest.raises(ConfigError):
        replace(made(), **lie)


def bounded(guarantee: Guarantee) -> Guarantee:
    return replace(guarantee, channel=ChannelConfig(dimensions=4, noise=0.5), epochs=10)


def test_a_bounded_task_says_what_is_bounded_and_under_which_assumptions():
    """4 numbers under noise .5 carry (4/2) log2(1 + 4) = 4.644 bits (SPEC E.7), and never fewer are printed."""
    text = bounded(made()).statement()
    for part in (
        "(4.00, 1e-05)-differential privacy for the weights of encoder.",
        "later; the bound on features does.",
        "Each feature of this task carries at most 4.65 bits about its image, whatever the attacker knows",
        "4 numbers of mean square 1 under Gaussian noise of standard deviation 0.5",
        "Asking again for the same image gives the same noise",
        "several images of the same person add up",
        "each training and validation image 10 times",
        ", 1e-05)-local differential privacy for any two images",
        "as long as the producer's noise key is secret",
    ):
        assert part in text
    assert "may be inverted" not in text
    assert bounded(made()).short().endswith("; features of at most 4.65 bits")


def test_a_bounded_task_without_dp_claims_nothing_for_the_weights():
    plain = guarantee_for(DpConfig(), accountant=None, n_train=N)
    text = bounded(plain).statement()
    assert text.startswith("Guarantee for the weights: none: trained without differential privacy. Nothing is promised")
    assert text.endswith("Privacy between tasks: by that bound alone.")
    assert bounded(plain).epsilon is None


def test_statements_of_bounded_tasks_survive_json_and_older_ones_still_load():
    again = Guarantee.from_json(json.loads(json.dumps(bounded(made()).to_json())))
    assert again == bounded(made())
    older = made().to_json()
    assert not {"channel", "epochs", "noise_kind"} & set(older)
    assert Guarantee.from_json(older) == made()
    with pytest.raises(ConfigError, match="noise of a bounded feature"):
        Guarantee.from_json({**bounded(made()).to_json(), "channel": {"dimensions": 4, "noise": 0.0, "cells": 1}})
    with pytest.raises(ConfigError, match="epochs of a guarantee must be a whole number or null"):
        Guarantee.from_json({**bounded(made()).to_json(), "epochs": "10"})
    with pytest.raises(ConfigError, match="comes with the epochs"):
        replace(made(), channel=ChannelConfig(dimensions=4, noise=0.5))


def test_what_asking_again_gives_is_said_as_it_is():
    keyed, fresh = (replace(bounded(made()), noise_kind=kind) for kind in ("keyed", "fresh"))
    for older_or_keyed in (keyed, bounded(made())):
        assert "Asking again for the same image gives the same noise" in older_or_keyed.statement()
    assert "Asking again" not in fresh.statement()
    assert "whoever asks n times for the same image is told up to n times 4.65 bits" in fresh.statement()
    assert Guarantee.from_json(json.loads(json.dumps(fresh.to_json()))) == fresh
    with pytest.raises(ConfigError, match="keyed or fresh, got 'none'"):
        replace(bounded(made()), noise_kind="none")
    with pytest.raises(ConfigError, match="keyed or fresh"):
        replace(made(), noise_kind="keyed")
