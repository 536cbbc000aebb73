"""Phase 1 as a Ray Train job: the same numbers as in one process, and the project's own errors."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch
from tiny import TINY_NETWORK, tiny_training_data

from orchestrator.checkpoint import weights_hash
from orchestrator.checkpoints import Checkpoints
from orchestrator.encoder_training import EncoderTrainingConfig
from orchestrator.errors import NonFiniteLossError
from orchestrator.privacy.dp import DpConfig
from orchestrator.privacy.ledger import Ledger, LedgerCharge, Mechanism
from orchestrator.train_job import EncoderJob, train_encoder, train_encoder_here
from orchestrator.updates import make_plan

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray leaves a socket to its log monitor for the interpreter to close, and Ray Train warns of Ray Data's settings.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle. is deprecated:DeprecationWarning"),
]


def job() -> EncoderJob:
    dp = DpConfig(epsilon=8.0, noise_seed=3, accountant="rdp")
    return EncoderJob(
        data=tiny_training_data(("left",)),
        network=TINY_NETWORK,
        config=EncoderTrainingConfig(epochs=2, batch_size=10),
        plan=make_plan(dp, n_train=40, batch_size=10, epochs=2),
        surrogate_head="linear",
        seed=0,
        device="cpu",
        threads=1,
    )


def test_ray_train_gives_the_weights_and_the_epsilon_of_one_process(tmp_path):
    seen = []
    on_ray = train_encoder(
        job(),
        storage=tmp_path,
        name="same",
        progress=lambda step, total, epoch: seen.append((step, total, epoch and epoch.epoch)),
    )
    here = train_encoder_here(job())
    assert weights_hash(dict(on_ray.encoder)) == weights_hash(dict(here.encoder))
    assert on_ray.steps == here.steps
    assert seen == [(n, 8, {4: 1, 8: 2}.get(n)) for n in range(1, 9)]
    assert on_ray.accountant["history"] == here.accountant["history"]


@pytest.mark.parametrize("private", [True, False])
def test_two_workers_share_the_batches_and_give_the_weights_and_the_epsilon_of_one(tmp_path, private):
    base = job() if private else dataclasses.replace(job(), plan=None)
    alone = train_encoder_here(base)
    shared = train_encoder(dataclasses.replace(base, workers=2), storage=tmp_path, name="shared")
    for name, value in alone.encoder.items():
        torch.testing.assert_close(shared.encoder[name], value, rtol=1e-4, atol=1e-6)
    assert shared.steps == alone.steps
    assert shared.accountant == alone.accountant
    if private:
        assert shared.accountant["history"][0][2] == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_takes_the_same_steps_again(tmp_path, workers):
    with Ledger(tmp_path / "ledger.db") as ledger:
        base = job()
        mechanism = Mechanism(noise_multiplier=base.plan.noise_multiplier, sample_rate=base.plan.sample_rate, steps=8)
        number = ledger.reserve(
            "a", "tiny", mechanism, run="r", part="encoder", mode="whole", delta=1e-3, secret=base.plan.secret_seed
        )
        charge, marker = LedgerCharge(tmp_path / "ledger.db", number), tmp_path / "died"

        def deadly(step: int) -> None:
            """Kills its process once, after step 6 was charged and before it is applied."""
            charge(step)
            if step == 6 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        mortal = dataclasses.replace(
            base,
            plan=dataclasses.replace(base.plan, charge=deadly),
            workers=workers,
            checkpoints=Checkpoints(folder=tmp_path / "encoder", kind="encoder", identity="r"),
            checkpoint_steps=3,
        )
        told: list[str] = []
        disturbed = train_encoder(mortal, storage=tmp_path / "train", name="mortal", note=told.append)
        (entry,) = ledger.account("tiny").entries
    assert marker.exists()
    assert told == ["the training of the encoder goes on after step 4"]
    alone = train_encoder_here(base)
    for name, value in alone.encoder.items():
        torch.testing.assert_close(disturbed.encoder[name], value, rtol=1e-4, atol=1e-6)
    assert disturbed.accountant == alone.accountant
    assert entry.charged == 8, "steps that are done again are not charged again"


def test_a_training_that_diverges_ends_the_job_with_its_own_error(tmp_path):
    base = job()
    wild = dataclasses.replace(base, plan=None, config=dataclasses.replace(base.config, lr=1e30, epochs=3))
    with pytest.raises(NonFiniteLossError) as caught:
        train_encoder(wild, storage=tmp_path, name="wild")
    assert caught.value.task == "left"
