"""H1: the attack works with the guard off and does not with it on; its parts are what they are said to be."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from orchestrator.assembly import SessionConfig, SessionPlan, TrainingData
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.evaluation.attacks.hijack import (
    HijackConfig,
    HijackingConsumer,
    measure_hijack,
    reconstruction,
)
from orchestrator.local import LocalProducer
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from tasks.datasets import DatasetOptions, open_dataset
from tasks.datasets.splits import SUBSETS, SplitFractions, split_rows

SMALL = HijackConfig(width=16, critic_steps=1, decoder_epochs=20)


@pytest.fixture
def live_plan(tiny_plan):
    config = dataclasses.replace(tiny_plan.config, lr=1e-3, schedule="constant")
    return dataclasses.replace(tiny_plan, frozen=False, config=config, dissimilarity=DissimilarityConfig(omega=0.0))


def attacker_of(plan, attack=SMALL, public=None):
    producer = LocalProducer(plan)
    public = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1 if public is None else public
    attacker = HijackingConsumer(producer.offers()["left"], plan.consumer_config("left"), public, attack, seed=0)
    key = attacker.public_key().result()
    attacker.receive_labels(producer.seal_labels(key, "train"))
    return producer, attacker


def test_images_that_are_equal_and_images_that_are_off_by_a_tenth():
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    same = reconstruction(x, x)
    assert (same.n, same.mse, same.ssim) == (5, 0.0, pytest.approx(1.0))
    off = reconstruction(x + 0.2, x)  # 0.1 of the range from 0 to 1
    assert off.mse == pytest.approx(0.01, rel=1e-4)
    assert off.psnr == pytest.approx(20.0, abs=1e-3)
    assert off.ssim < 1


def test_its_gradient_is_uphill_for_its_critic_and_knows_no_label(live_plan):
    producer, attacker = attacker_of(live_plan)
    batch = producer.features(0)["left"]
    answer = attacker.learn(batch).result()
    z = torch.tensor(batch.result().features)
    uphill = z - 1e-3 * torch.from_numpy(answer.gradient) / np.abs(answer.gradient).max()
    with torch.no_grad():
        assert attacker.critic(uphill).mean() > attacker.critic(z).mean()
    _, other = attacker_of(live_plan)
    labels = other.consumer._labels
    labels["train"] = 1 - labels["train"]
    np.testing.assert_array_equal(other.learn(batch).result().gradient, answer.gradient)


def test_sincerity_adds_the_tasks_own_gradient_by_its_norm(live_plan):
    producer, plain = attacker_of(live_plan)
    _, mixed = attacker_of(live_plan, dataclasses.replace(SMALL, sincerity=3.0))
    batch = producer.features(0)["left"]
    a, b = plain.learn(batch).result().gradient, mixed.learn(batch).result().gradient
    assert np.linalg.norm(b - a) == pytest.approx(3 * np.linalg.norm(a), rel=1e-4)


def test_a_repeated_step_is_answered_from_memory(live_plan):
    producer, attacker = attacker_of(live_plan)
    batch = producer.features(0)["left"]
    first = attacker.learn(batch).result()
    before = [p.clone() for p in attacker.pilot.parameters()]
    assert attacker.learn(batch).result() is first
    assert all(torch.equal(a, b) for a, b in zip(before, attacker.pilot.parameters(), strict=True))
    assert sorted(attacker.seen) == sorted(batch.result().example_ids.tolist())


def test_the_guard_stops_the_attack_and_without_it_nobody_does(live_plan):
    report = measure_hijack(live_plan, task="left", attack=SMALL, steps=25)
    off, on = report.runs
    assert (off.guard, off.steps, off.stopped) == (False, 25, None)
    assert on.guard and on.steps < 25
    assert "do not follow its labels" in on.stopped
    assert on.private.mse > report.mean_image.mse
    assert set(on.others) == {"bright"}
    assert json.loads(json.dumps(report.to_json()))["runs"][1]["stopped"] == on.stopped


@pytest.mark.slow
def test_without_the_guard_private_digits_are_read_and_with_it_they_are_not(tmp_path):
    """The whole attack, on pictures of digits: better than the mean image by far, or worse than it."""
    table = open_dataset("digits", image_size=16, options=DatasetOptions())
    splits = split_rows(len(table), seed=0, fractions=SplitFractions(), groups=None)
    plan = SessionPlan(
        data=TrainingData.of(table, {s: splits.subset(s) for s in SUBSETS}, ("parity", "large")),
        network=NetworkConfig(split_index=5, head="linear"),
        config=SessionConfig(schedule="constant"),
        dissimilarity=DissimilarityConfig(omega=0.0),
        seed=0,
        frozen=False,
        cache_root=tmp_path,
        device="cpu",
    )
    report = measure_hijack(plan, task="parity", steps=250)
    off, on = report.runs
    assert off.private.psnr > report.mean_image.psnr + 3
    assert off.private.ssim > report.mean_image.ssim + 0.2
    assert on.steps < 10
    assert on.private.psnr < report.mean_image.psnr + 0.5


def test_what_makes_no_sense_is_refused(live_plan):
    with pytest.raises(UnknownNameError):
        measure_hijack(live_plan, task="nothing")
    with pytest.raises(ConfigError):
        HijackConfig(sincerity=-1.0)
    with pytest.raises(ConfigError):
        HijackConfig(width=0)
    with pytest.raises(ConfigError, match="power of two"):
        attacker_of(live_plan, public=torch.zeros(3, 3, 12, 12))
