"""Phase 1 as a Ray Train job: the same numbers as in one process, and the project's own errors."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import TINY_NETWORK, tiny_training_data

from orchestrator.checkpoint import weights_hash
from orchestrator.encoder_training import EncoderTrainingConfig, make_plan
from orchestrator.errors import NonFiniteLossError
from orchestrator.privacy.dp import DpConfig
from orchestrator.train_job import EncoderJob, train_encoder, train_encoder_here

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
        progress=lambda step, total, epoch: seen.append((step, total, epoch.epoch)),
    )
    here = train_encoder_here(job())
    assert weights_hash(dict(on_ray.encoder)) == weights_hash(dict(here.encoder))
    assert on_ray.steps == here.steps
    assert seen == [(4, 8, 1), (8, 8, 2)]
    assert on_ray.accountant["history"] == here.accountant["history"]


def test_a_training_that_diverges_ends_the_job_with_its_own_error(tmp_path):
    base = job()
    wild = dataclasses.replace(base, plan=None, config=dataclasses.replace(base.config, lr=1e30, epochs=3))
    with pytest.raises(NonFiniteLossError) as caught:
        train_encoder(wild, storage=tmp_path, name="wild")
    assert caught.value.task == "left"
