"""Modules under DP, on a frozen encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import BOUNDED_NETWORK, TINY_NETWORK, tiny_training_data

from orchestrator.checkpoint import weights_hash
from orchestrator.encoder_training import EncoderTrainingConfig
from orchestrator.errors import PrivacyRefusal
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.module_training import ModuleTraining
from orchestrator.network import NetworkConfig
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.dp import DpBudget
from orchestrator.train_job import ModuleJob, train_encoder_here
from orchestrator.updates import make_plan

FIXED = ModuleConfig(kind="cross_sec", channels=64)


def job(
    cache: Path,
    *,
    omega: float = 0.1,
    lr: float = 1e-3,
    fixed: bool = False,
    epsilon: float = 8.0,
    network: NetworkConfig = TINY_NETWORK,
) -> ModuleJob:
    plan = make_plan(
        DpBudget(epsilon=epsilon, noise_seed=3, accountant="rdp"),
        n_train=40,
        batch_size=10,
        epochs=2,
        mode="surrogate_dp_modules",
    )
    return ModuleJob(
        data=tiny_training_data(),
        network=network,
        config=EncoderTrainingConfig(epochs=2, batch_size=10, lr=lr),
        plan=plan,
        surrogate_head="linear",
        seed=0,
        device="cpu",
        threads=1,
        name="modules",
        encoder=TINY_NETWORK.build_encoder(seed=0).state_dict(),
        dissimilarity=DissimilarityConfig(omega=omega),
        fixed_modules={"old": (FIXED, build_module(FIXED, seed=9).state_dict())} if fixed else {},
        cache_root=cache,
    )


def test_modules_are_released_and_their_stand_ins_and_the_encoder_are_not(tmp_path):
    result = train_encoder_here(job(tmp_path))
    assert set(result.modules) == {"bright", "left"}
    assert not result.heads
    assert not result.encoder
    assert result.accountant["history"][0][2] == 8


def test_every_module_and_stand_in_is_under_one_clip(tmp_path):
    training = job(tmp_path).build()
    held = {id(p) for group in training._update.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for part in (*training.modules.values(), *training.heads.values()) for p in part.parameters()}


def test_the_dissimilarity_term_changes_what_is_learned_and_fixed_modules_take_part(tmp_path):
    learned = {
        name: weights_hash(train_encoder_here(job(tmp_path, **options)).modules["left"])
        for name, options in {
            "together": {"omega": 10.0},
            "without": {"omega": 0.0},
            "with an old one": {"omega": 10.0, "fixed": True},
        }.items()
    }
    assert len(set(learned.values())) == 3


def test_the_gradient_of_one_image_is_clipped_with_the_dissimilarity_in_it(tmp_path):
    """However large omega is, what one batch adds to the weights' sum is at most its size times the clipping norm."""
    made = job(tmp_path, omega=1e6)
    training = dataclasses.replace(made, plan=dataclasses.replace(made.plan, noise_multiplier=0.0)).build()
    seen = []
    real = training._update.optimizer.step
    training._update.optimizer.step = lambda: (
        seen.append(
            sum(float(p.grad.square().sum()) for g in training._update.optimizer.param_groups for p in g["params"])
            ** 0.5
        ),
        real(),
    )
    for step in range(4):
        size = len(training.sampler.ids(step))
        training.train_step()
        assert 0 < seen[-1] * 10 <= size * made.plan.max_grad_norm * (1 + 1e-4)


def test_it_goes_on_from_its_state_to_the_same_weights(tmp_path):
    straight, resumed = job(tmp_path).build(), job(tmp_path).build()
    for _ in range(3):
        straight.train_step()
    resumed.load_state_dict(straight.state_dict())
    for training in (straight, resumed):
        for _ in range(2):
            training.train_step()
    assert weights_hash(resumed.logits.state_dict()) == weights_hash(straight.logits.state_dict())


def test_a_dissimilarity_over_the_batch_is_refused(tmp_path, monkeypatch):
    import orchestrator.module_training as module

    class Coupled:
        def __init__(self, config):
            self.config = config

        def __call__(self, features, *, fixed):
            a, b = list(features.values())[:2]
            value = (a / a.detach().max() - b / b.detach().max()).square().mean()
            return type("Value", (), {"loss": value})

    monkeypatch.setattr(module, "Dissimilarity", Coupled)
    with pytest.raises(PrivacyRefusal, match="the dissimilarity ssim"):
        job(tmp_path).build()


def test_evaluation_sees_no_features(tmp_path):
    training = job(tmp_path).build()
    assert isinstance(training, ModuleTraining)
    assert set(training.evaluate("test")) == {"bright", "left"}
    training.logits.train()
    assert set(training.logits(torch.zeros(2, 64, 4, 4))) == {"bright", "left", "feature of bright", "feature of left"}


def test_a_bounded_module_is_trained_through_noise_of_the_channel_s_size_and_each_image_has_its_own(tmp_path):
    training = job(tmp_path, network=BOUNDED_NETWORK, omega=0.0).build()
    seen = []
    for task, head in training.logits.heads.items():
        head.register_forward_pre_hook(lambda _, inputs, task=task: seen.append((task, inputs[0].detach().clone())))
    ids = training.sampler.ids(0)
    with torch.no_grad():
        clean = training.logits.features(training.inputs.training(0, ids))
    training.train_step()
    noise = torch.stack([z - clean[task.removeprefix("task_")] for task, z in seen]) / BOUNDED_NETWORK.channel.noise
    assert noise.shape[:2] == (2, len(ids))
    assert noise.std().item() == pytest.approx(1, abs=0.25)
    assert len(noise.unique()) == noise.numel()


def test_a_bounded_module_is_evaluated_on_subsets_of_any_size(tmp_path):
    training = job(tmp_path, network=BOUNDED_NETWORK).build()
    training.train_step()
    assert set(training.evaluate("validation")) == {"bright", "left"}


def test_who_else_is_in_the_batch_changes_nothing_about_an_image_s_noise(tmp_path):
    """Otherwise one image more would move what all others do, and the clip would bound nothing."""
    training = job(tmp_path, network=BOUNDED_NETWORK).build()
    together, apart = training._noise("left", np.array([5, 7, 9])), training._noise("left", np.array([9]))
    assert torch.equal(together[2:], apart)
    assert not torch.equal(apart, training._noise("bright", np.array([9])))
    training.step = 1
    assert not torch.equal(apart, training._noise("left", np.array([9])))


def test_the_gradient_of_one_image_is_clipped_with_the_noise_of_its_feature_in_it(tmp_path):
    made = job(tmp_path, network=BOUNDED_NETWORK, omega=0.0)
    training = dataclasses.replace(made, plan=dataclasses.replace(made.plan, noise_multiplier=0.0)).build()
    for name, parameter in training.logits.named_parameters():
        if "heads" in name:
            parameter.data.mul_(1e4)
    before = {name: p.detach().clone() for name, p in training.logits.named_parameters()}
    training._update.optimizer.param_groups[0]["lr"] = 1.0
    seen = []
    real = training._update.optimizer.step
    training._update.optimizer.step = lambda: (
        seen.append(sum(float(p.grad.square().sum()) for p in training.logits.parameters()) ** 0.5),
        real(),
    )
    for step in range(4):
        size = len(training.sampler.ids(step))
        training.train_step()
        assert 0 < seen[-1] * 10 <= size * made.plan.max_grad_norm * (1 + 1e-4)
    assert any(not torch.equal(before[name], p) for name, p in training.logits.named_parameters() if "vector" in name)


def test_a_bounded_module_goes_on_from_its_state_to_the_same_weights(tmp_path):
    straight, resumed = (job(tmp_path, network=BOUNDED_NETWORK).build() for _ in range(2))
    for _ in range(3):
        straight.train_step()
    resumed.load_state_dict(straight.state_dict())
    for training in (straight, resumed):
        for _ in range(2):
            training.train_step()
    assert weights_hash(resumed.logits.state_dict()) == weights_hash(straight.logits.state_dict())
