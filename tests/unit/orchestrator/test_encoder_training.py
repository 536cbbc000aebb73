"""Phase 1 in every mode."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from tiny import TINY_NETWORK, tiny_training_data
from torch import nn

from orchestrator.checkpoint import weights_hash
from orchestrator.encoder_training import EncoderTraining, EncoderTrainingConfig
from orchestrator.errors import ConfigError, PrivacyRefusal
from orchestrator.privacy.dp import DpConfig, DpMode
from orchestrator.sampling import PoissonBatches, ShuffledBatches
from orchestrator.train_job import EncoderJob
from orchestrator.updates import build_update, make_plan
from tasks.losses import LOSSES, cross_entropy

MODES = tuple(get_args(DpMode))
SURROGATES = ("surrogate_then_freeze", "surrogate_dp_modules")


def job(mode: str | None, *, epochs: int = 2, tasks: tuple[str, ...] = ("left",), epsilon: float = 8.0) -> EncoderJob:
    data = tiny_training_data(tasks)
    config = EncoderTrainingConfig(epochs=epochs, batch_size=10, lr=1e-3)
    plan = None
    if mode is not None:
        public = "digits" if mode == "public_head" else None
        dp = DpConfig(epsilon=epsilon, dp_mode=mode, noise_seed=3, accountant="rdp", public_data=public)
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
        public=dataclasses.replace(data, rows={"train": np.arange(40, 76)}) if mode == "public_head" else None,
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
    assert set(result.modules) == (set() if mode in SURROGATES else {"left"})
    assert set(result.heads) == (set() if mode in SURROGATES else {"left"})


def noised(training: EncoderTraining) -> dict[str, bool]:
    """Which parts of the network hold parameters that the private step clips and noises."""
    held = {id(p) for group in training._update.optimizer.param_groups for p in group["params"]}
    parts = {"encoder": training.encoder, "modules": training.logits.features.branches, "heads": training.logits.heads}
    return {name: any(id(p) in held for p in part.parameters()) for name, part in parts.items()}


@pytest.mark.parametrize("mode", MODES)
def test_which_part_is_clipped_and_noised(mode):
    assert noised(job(mode).build()) == {
        "encoder": True,
        "modules": mode not in SURROGATES,
        "heads": mode in (*SURROGATES, "whole", "two_budget"),
    }


def heads_after(training: EncoderTraining, steps: int) -> str:
    for _ in range(steps):
        training.train_step()
    return weights_hash(training.logits.heads.state_dict())


def test_a_frozen_head_stays_as_it_was_and_may_be_given():
    training = job("frozen_head").build()
    before = heads_after(training, 0)
    assert heads_after(training, 3) == before
    weights = {name: torch.full_like(value, 0.25) for name, value in training.heads["left"].state_dict().items()}
    given = dataclasses.replace(job("frozen_head"), head_weights=weights).build()
    assert all(torch.equal(value, weights[name]) for name, value in given.heads["left"].state_dict().items())
    with pytest.raises(ConfigError, match="is no head for 'left'"):
        dataclasses.replace(job("frozen_head"), head_weights={"other": torch.zeros(2)}).build()


def test_a_public_head_knows_nothing_of_the_private_labels_but_what_the_noisy_encoder_says():
    """With the encoder held still (a learning rate of nothing), other private labels change nothing about the head."""

    def head(labels: str, *, lr: float) -> str:
        made = job("public_head")
        data = made.data
        if labels == "turned":
            left = {s: 1 - values for s, values in data.labels["left"].items()}
            data = dataclasses.replace(data, labels={"left": left})
        training = dataclasses.replace(made, data=data).build()
        training.config = dataclasses.replace(training.config, lr=lr)
        for group in training._head_optimizer.param_groups:
            group["lr"] = 1e-2
        return heads_after(training, 3)

    assert head("as they are", lr=1e-30) == head("turned", lr=1e-30)
    assert head("as they are", lr=1e-1) != head("turned", lr=1e-1)
    assert head("as they are", lr=1e-30) != heads_after(job("public_head").build(), 0)


def test_two_budgets_cost_as_much_as_one_mechanism():
    """Composing both parts' mechanisms by Renyi DP on their own would cost more; jointly, 1/sigma^2 adds up."""
    plan = job("two_budget").plan
    rest, head = plan.parts()[""], plan.parts()["heads."]
    assert 1 / rest.noise_multiplier**2 + 1 / head.noise_multiplier**2 == pytest.approx(1 / plan.noise_multiplier**2)
    uneven = dataclasses.replace(plan, head_budget=0.2, head_max_grad_norm=0.5).parts()
    assert uneven["heads."].max_grad_norm == 0.5
    assert uneven["heads."].noise_multiplier == pytest.approx(plan.noise_multiplier / 0.2**0.5)
    assert job("whole").plan.parts() is None


def test_a_loss_over_batch_statistics_is_refused_with_its_name(monkeypatch):
    def normalised(logits, targets):
        return cross_entropy(logits / logits.detach().abs().max(), targets)

    monkeypatch.setitem(LOSSES, "cross_entropy", normalised)
    with pytest.raises(PrivacyRefusal, match=r"the loss 'cross_entropy' of 'left'.*taken by itself"):
        job("whole").build()
    job(None).build()


def test_batches_that_the_accountant_does_not_know_of_are_refused():
    made = job("whole")

    def update(sampler):
        network, plan = TINY_NETWORK.build_encoder(seed=0), made.plan
        return build_update(network, made.config.optimiser, plan=plan, accountant=plan.accountant(), sampler=sampler)

    update(PoissonBatches(40, batch_size=10, seed=1))
    with pytest.raises(PrivacyRefusal, match="ShuffledBatches does not draw like that: use PoissonBatches"):
        update(ShuffledBatches(40, batch_size=10, seed=1))
    for other in (PoissonBatches(40, batch_size=20, seed=1), PoissonBatches(80, batch_size=20, seed=1)):
        with pytest.raises(PrivacyRefusal, match="are accounted"):
            update(other)


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
            sampler=training.sampler,
            head_path=head,
        )


def test_a_plan_does_not_show_its_secret():
    plan = job("whole").plan
    assert str(plan.secret_seed) not in repr(dataclasses.replace(plan, secret_seed=987654321))
    assert "987654321" not in repr(dataclasses.replace(plan, secret_seed=987654321))
