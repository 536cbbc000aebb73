"""Phase 1 in every mode."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from tiny import TINY_NETWORK, tiny_training_data
from torch import nn

from orchestrator.checkpoint import weights_hash
from orchestrator.encoder_training import EncoderTraining, EncoderTrainingConfig, make_plan
from orchestrator.errors import PrivacyRefusal
from orchestrator.privacy.dp import DpConfig
from orchestrator.train_job import EncoderJob

MODES = ("surrogate_then_freeze", "whole", "encoder_only_paper")


def job(mode: str | None, *, epochs: int = 2, tasks: tuple[str, ...] = ("left",), epsilon: float = 8.0) -> EncoderJob:
    data = tiny_training_data(tasks)
    config = EncoderTrainingConfig(epochs=epochs, batch_size=10, lr=1e-3)
    plan = None
    if mode is not None:
        dp = DpConfig(epsilon=epsilon, dp_mode=mode, noise_seed=3, accountant="rdp")
        plan = make_plan(dp, n_train=40, batch_size=10, epochs=epochs)
    return EncoderJob(
        data=data,
        network=TINY_NETWORK,
        config=config,
        plan=plan,
        surrogate_head="linear",
        seed=0,
        device="cpu",
        threads=1,
    )


def run(training: EncoderTraining) -> EncoderTraining:
    for _ in range(training.config.epochs):
        training.run_epoch()
    return training


def test_without_an_epsilon_the_encoder_learns_and_nothing_is_accounted():
    training = run(job(None, epochs=12).build())
    assert training.evaluate("test")["left"]["accuracy"] >= 0.9
    assert training.result().accountant is None
    assert training.epsilon_spent == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_every_step_is_accounted_and_the_budget_is_met_at_the_end(mode):
    training = run(job(mode).build())
    plan = training.plan
    assert training.accountant.steps == plan.steps == training.total_steps
    # Opacus's calibration ends at most 0.01 below the target.
    assert plan.epsilon - 0.011 <= training.epsilon_spent <= plan.epsilon


@pytest.mark.parametrize("mode", MODES)
def test_what_is_released_depends_on_the_mode(mode):
    result = run(job(mode, epochs=1).build()).result()
    assert result.encoder
    assert set(result.modules) == (set() if mode == "surrogate_then_freeze" else {"left"})
    assert set(result.heads) == (set() if mode == "surrogate_then_freeze" else {"left"})


def noised(training: EncoderTraining) -> dict[str, bool]:
    """Which parts of the network hold parameters that the private step clips and noises."""
    held = {id(p) for group in training._update.optimizer.param_groups for p in group["params"]}
    parts = {"encoder": training.encoder, "modules": training.logits.features.branches, "heads": training.logits.heads}
    return {name: any(id(p) in held for p in part.parameters()) for name, part in parts.items()}


def test_which_part_is_clipped_and_noised():
    assert noised(job("surrogate_then_freeze").build()) == {"encoder": True, "modules": False, "heads": True}
    assert noised(job("whole").build()) == {"encoder": True, "modules": True, "heads": True}
    assert noised(job("encoder_only_paper").build()) == {"encoder": True, "modules": True, "heads": False}


def test_an_empty_poisson_batch_is_noised_and_charged(monkeypatch):
    training = job("surrogate_then_freeze").build()
    before = weights_hash(training.encoder.state_dict())
    monkeypatch.setattr(training.sampler, "ids", lambda step: np.zeros(0, dtype=np.int64))
    assert training.train_step() == {}
    assert training.accountant.steps == 1
    assert weights_hash(training.encoder.state_dict()) != before


@pytest.mark.parametrize("mode", [None, *MODES])
def test_an_interrupted_training_goes_on_to_the_same_weights(mode):
    straight = run(job(mode).build())
    first = job(mode).build()
    first.run_epoch()
    state = first.state_dict()
    first.run_epoch()
    resumed = job(mode).build()
    resumed.load_state_dict(state)
    resumed.run_epoch()
    assert weights_hash(resumed.result().encoder) == weights_hash(straight.result().encoder)
    assert resumed.epsilon_spent == straight.epsilon_spent


def test_noise_differs_from_step_to_step_and_from_secret_to_secret():
    """With nothing but noise (empty batches), two steps, and two secrets, move the weights differently."""

    def moves(secret: int) -> list[torch.Tensor]:
        made = job("surrogate_then_freeze")
        plan = dataclasses.replace(made.plan, secret_seed=secret)
        training = dataclasses.replace(made, plan=plan).build()
        training.sampler.ids = lambda step: np.zeros(0, dtype=np.int64)
        weight = next(training.encoder.parameters())
        seen = [weight.detach().clone()]
        for _ in range(2):
            training.train_step()
            seen.append(weight.detach().clone())
        return [b - a for a, b in itertools.pairwise(seen)]

    a, b = moves(1), moves(2)
    assert not torch.allclose(a[0], a[1])
    assert not torch.allclose(a[0], b[0])
    assert torch.equal(moves(1)[1], a[1])


def test_a_batchnorm_behind_a_private_encoder_is_refused():
    training = job("encoder_only_paper").build()
    head = nn.Sequential(nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(PrivacyRefusal, match="BatchNorm2d"):
        training.plan.private_step(
            training.encoder,
            torch.optim.SGD(training.encoder.parameters(), lr=0.1),
            accountant=training.plan.accountant(),
            head_path=head,
        )


def test_a_plan_does_not_show_its_secret():
    plan = job("whole").plan
    assert str(plan.secret_seed) not in repr(dataclasses.replace(plan, secret_seed=987654321))
    assert "987654321" not in repr(dataclasses.replace(plan, secret_seed=987654321))
