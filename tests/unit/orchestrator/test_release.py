"""Bounded features in a session: noise on what leaves, none on what comes back, and the same again when asked again."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from evaluations import encoder_record, guarantee, task_record
from tiny import BOUNDED_NETWORK, TINY_NETWORK

from orchestrator import release
from orchestrator.assembly import SessionPlan
from orchestrator.checkpoint import weights_hash
from orchestrator.errors import BitBudgetExceededError, ConfigError
from orchestrator.local import LocalConsumer, LocalProducer
from orchestrator.privacy.bounded.bit_ledger import BitLedger
from orchestrator.privacy.bounded.channel import RELEASE_STEP, ChannelConfig, power_normalise
from orchestrator.privacy.bounded.keyed_noise import ImageDigests, NoiseKey
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.release import NoisePlan, PublishedRelease
from orchestrator.session import Session
from tasks.spec import TaskSpec

CHANNEL, BOUNDED = BOUNDED_NETWORK.channel, BOUNDED_NETWORK


def open_session(plan: SessionPlan) -> Session:
    producer = LocalProducer(plan)
    consumers = [LocalConsumer(producer.offers()[t], plan.consumer_config(t)) for t in plan.data.specs]
    session = Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=plan.config.epochs)
    session.enrol()
    return session


def shown(plan: SessionPlan, *, steps: int = 0, subset: str = "") -> dict[str, np.ndarray]:
    """What tenants get at the next step after ``steps``, or of a subset then."""
    session = open_session(plan)
    for _ in range(steps):
        session.train_step()
    return shown_by(session, steps, subset)


def shown_by(session: Session, steps: int, subset: str = "") -> dict[str, np.ndarray]:
    batches = session.producer.evaluation_features(subset) if subset else session.producer.features(steps)
    return {task: batch.result().features for task, batch in batches.items()}


def test_a_bounded_session_learns_although_every_feature_is_noisy(bounded_plan):
    plan = dataclasses.replace(bounded_plan, config=dataclasses.replace(bounded_plan.config, epochs=40))
    reports = open_session(plan).run()
    for task in plan.data.specs:
        assert reports[-1].losses[task] < 0.7 * reports[0].losses[task]
        assert reports[-1].validation[task].metrics["accuracy"] >= 0.75
    assert not reports[-1].dissimilarity_by_pair


def test_what_leaves_is_on_the_grid_and_carries_noise_of_the_right_size(bounded_plan):
    """z - s, of all images and both tasks: mean 0, standard deviation tau, and no two alike."""
    session = open_session(bounded_plan)
    producer = session.producer.producer
    z = shown_by(session, 0, "train")
    with torch.no_grad():
        s = {task: v.numpy() for task, v in producer._evaluate(producer._source.subset("train", 0, 40)).items()}
    noise = np.stack([z[task] - s[task] for task in z]).ravel()
    n = noise.size
    assert np.array_equal(z["left"], np.round(z["left"] / RELEASE_STEP) * RELEASE_STEP)
    assert abs(noise.mean()) < 4 * CHANNEL.noise / math.sqrt(n)
    assert noise.std() == pytest.approx(CHANNEL.noise, abs=4 * CHANNEL.noise / math.sqrt(2 * n))
    assert len(np.unique(noise.round(4))) > 0.95 * n


def test_without_the_noise_the_test_above_fails(bounded_plan, monkeypatch):
    def silent(key, *, images, channel, **_):
        return np.zeros((len(images), channel.dimensions))

    monkeypatch.setattr(release, "keyed_normal", silent)
    with pytest.raises(AssertionError):
        test_what_leaves_is_on_the_grid_and_carries_noise_of_the_right_size(bounded_plan)


def test_a_step_has_the_same_noise_again_and_every_other_step_task_or_run_another(bounded_plan, key_path):
    one = open_session(bounded_plan)
    first = shown_by(one, 0)
    assert all(np.array_equal(first[task], again) for task, again in shown_by(one, 0).items())
    other_run = shown(dataclasses.replace(bounded_plan, noise=NoisePlan(key=key_path, run="b")))
    key = NoiseKey.load(key_path)
    draws = [
        release.step_normal(key, run=run, task=task, step=step, n=8, channel=CHANNEL)
        for run, task, step in [("a", "left", 0), ("b", "left", 0), ("a", "bright", 0), ("a", "left", 1)]
    ]
    for i, draw in enumerate(draws):
        assert all(not np.isin(draw, other).any() for other in draws[:i])
    longer = release.step_normal(key, run="a", task="left", step=0, n=9, channel=CHANNEL)
    assert longer[:8].tobytes() == draws[0].tobytes()
    assert all(not np.array_equal(first[task], other_run[task]) for task in first)


def test_a_resumed_session_ends_as_one_that_was_never_interrupted(bounded_plan):
    whole = open_session(bounded_plan)
    whole.run()
    broken = open_session(bounded_plan)
    for _ in range(4):
        broken.train_step()
    resumed = open_session(bounded_plan)
    resumed.load_state_dict(broken.state_dict())
    for step in range(4, bounded_plan.total_steps):
        a, b = shown_by(broken, step), shown_by(resumed, step)
        assert all(np.array_equal(a[task], b[task]) for task in a)
        broken.train_step()
        resumed.train_step()
    assert weights_hash(resumed.producer.weights()) == weights_hash(whole.producer.weights())


def test_features_of_a_subset_are_the_same_bytes_when_asked_for_twice(bounded_plan):
    session = open_session(bounded_plan)
    first, again = shown_by(session, 0, "test"), shown_by(session, 0, "test")
    assert all(first[task].tobytes() == again[task].tobytes() for task in first)


def test_other_weights_never_share_the_noise_of_an_image(bounded_plan):
    """Otherwise the difference of two features would hold none. With weights of zero, s is zero and z is the noise."""
    session = open_session(bounded_plan)
    producer = session.producer.producer

    def noise() -> np.ndarray:
        kept = producer.weights()
        producer._network.load_state_dict({name: torch.zeros_like(value) for name, value in kept.items()})
        z = shown_by(session, session.step, "test")
        producer._network.load_state_dict(kept)
        return np.stack([z["left"], z["bright"]]).ravel()

    before = noise()
    session.train_step()
    after = noise()
    assert before.std() == pytest.approx(CHANNEL.noise, rel=0.3)
    assert abs(np.corrcoef(before, after)[0, 1]) < 4 / math.sqrt(before.size)
    left, bright = np.split(before, 2)
    assert abs(np.corrcoef(left, bright)[0, 1]) < 4 / math.sqrt(left.size)


def test_gradients_pass_straight_through_noise_and_grid(bounded_plan):
    """The producer's step is the one that plain PyTorch takes with z = s + constant."""
    session = open_session(bounded_plan)
    producer = session.producer.producer
    z = producer.features(0)
    gradients = {
        task: consumer.learn(session.producer.features(0)[task]).result()
        for task, consumer in session.consumers.items()
    }
    modules = BOUNDED.build_modules(bounded_plan.data.specs, 16, seed=bounded_plan.seed)
    u = producer._source.training(0, producer._sampler.ids(0))
    parameters = [p for module in modules.values() for p in module.parameters()]
    config = bounded_plan.config
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    for task, module in modules.items():
        s = module(u)
        constant = torch.from_numpy(z[task].features) - s.detach()
        ((s + constant) * torch.from_numpy(gradients[task].gradient)).sum().backward()
    optimiser.step()
    producer.learn(0, gradients)
    for task, module in modules.items():
        for name, value in module.state_dict().items():
            got = producer.weights()[f"branches.task_{task}.{name}"]
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


def test_bounded_tasks_are_kept_apart_from_features_of_their_shape_alone(bounded_plan):
    maps = (TINY_NETWORK.module_config(16), TINY_NETWORK.build_modules(["m"], 16, seed=5)["m"].state_dict())
    vectors = (BOUNDED.module_config(16), BOUNDED.build_modules(["v"], 16, seed=5)["v"].state_dict())
    plan = dataclasses.replace(
        bounded_plan,
        dissimilarity=DissimilarityConfig(omega=0.1),
        fixed_modules={"maps": maps, "vectors": vectors},
    )
    assert set(plan.kept_apart_from) == {"vectors"}
    pairs = open_session(plan).train_step().dissimilarity_by_pair
    assert set(pairs) == {"bright|left", "bright|vectors", "left|vectors"}


def test_the_guard_finds_honest_tenants_of_bounded_features_honest(bounded_plan):
    plan = dataclasses.replace(bounded_plan, config=dataclasses.replace(bounded_plan.config, epochs=12))
    session = open_session(plan)
    session.run()
    assert not session.quarantined


def test_a_live_encoder_may_stand_before_bounded_features(bounded_plan):
    session = open_session(dataclasses.replace(bounded_plan, frozen=False))
    session.run_epoch()
    assert weights_hash(session.producer.producer._network.encoder.state_dict()) != weights_hash(bounded_plan.encoder)


def test_bounded_features_without_noise_and_noise_without_them_are_refused(tiny_plan, bounded_plan, key_path):
    with pytest.raises(ConfigError, match="bounded features need noise"):
        dataclasses.replace(bounded_plan, noise=None)
    with pytest.raises(ConfigError, match="no others have any"):
        dataclasses.replace(tiny_plan, noise=NoisePlan(key=key_path, run="a"))


def dense_plan(plan: SessionPlan) -> SessionPlan:
    """Its one task is to draw the image's brightness, through 4 cells of 2 numbers."""
    data = plan.data
    spec = TaskSpec(name="left", target="left", shape=(1, 4, 4), head="map", loss="mse", metrics=("psnr",))
    side = data.images.shape[1] // 4
    grey = data.images.reshape(len(data.images), 4, side, 4, side, 3).mean(axis=(2, 4, 5)).round().astype(np.int64)
    labels = {"left": {subset: grey[rows][:, None] for subset, rows in data.rows.items()}}
    channel = ChannelConfig(dimensions=2, noise=0.3, cells=4)
    return dataclasses.replace(
        plan,
        data=dataclasses.replace(data, specs={"left": spec}, labels=labels),
        network=dataclasses.replace(BOUNDED, channel=channel),
        config=dataclasses.replace(plan.config, epochs=40),
    )


def test_a_map_is_learned_through_cells_each_of_which_has_its_own_noise(bounded_plan):
    plan = dense_plan(bounded_plan)
    session = open_session(plan)
    producer = session.producer.producer
    z = session.producer.evaluation_features("test")["left"].result().features
    with torch.no_grad():
        s = producer._evaluate(producer._source.subset("test", 0, len(z)))["left"].numpy()
    assert z.shape[1:] == (2, 2, 2) == plan.shape
    noise = (z - s) / plan.channel.noise
    assert noise.std() == pytest.approx(1, abs=0.15)
    together = np.corrcoef(noise.reshape(len(z), -1), rowvar=False)[np.triu_indices(8, k=1)]
    assert np.abs(together).max() < 5 / np.sqrt(len(z)), "cells that shared noise would give it away by a difference"
    reports = session.run()
    assert reports[-1].losses["left"] < 0.7 * reports[0].losses["left"]
    assert reports[-1].validation["left"].metrics["psnr"] > reports[0].validation["left"].metrics["psnr"] + 1


def test_more_cells_than_the_encoder_s_map_has_are_refused_before_anything_starts(bounded_plan):
    channel = ChannelConfig(dimensions=2, noise=0.3, cells=10_000)
    with pytest.raises(ConfigError, match="10000 vectors an image do not fit"):
        dataclasses.replace(bounded_plan, network=dataclasses.replace(BOUNDED, channel=channel))


def test_a_key_that_others_may_read_is_refused(bounded_plan, key_path):
    key_path.chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others"):
        LocalProducer(bounded_plan)


def published_release(kind: str | None) -> PublishedRelease:
    bounded = dataclasses.replace(guarantee(), channel=CHANNEL, epochs=2, noise_kind=kind)
    return PublishedRelease.of(encoder_record(), task_record("pose", promise=bounded), NoiseKey.generate())


IMAGES = ImageDigests.of(np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3))


@pytest.mark.parametrize("kind", ["keyed", None])
def test_a_keyed_release_asked_for_again_is_the_same_bytes_and_free(kind, tmp_path):
    made, s = published_release(kind), power_normalise(torch.ones(3, CHANNEL.dimensions))[:, :, None, None]
    first, again = made.noisy(s, IMAGES), made.noisy(s, IMAGES)
    assert first.numpy().tobytes() == again.numpy().tobytes()
    with BitLedger(tmp_path / "bits.db") as ledger:
        ledger.set_limit("tenant", "pose", 4 * CHANNEL.bits_per_image)
        assert made.charge(ledger, tenant="tenant", images=IMAGES) == pytest.approx(3 * CHANNEL.bits_per_image)
        assert made.charge(ledger, tenant="tenant", images=IMAGES) == 0.0


def test_a_fresh_release_has_other_noise_each_time_and_is_charged_each_time(tmp_path):
    made, s = published_release("fresh"), power_normalise(torch.ones(3, CHANNEL.dimensions))[:, :, None, None]
    draws = torch.stack([made.noisy(s, IMAGES) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    assert draws.std(0).mean().item() == pytest.approx(CHANNEL.noise, rel=0.05)
    torch.testing.assert_close(draws.mean(0), s, rtol=0, atol=5 * CHANNEL.noise / math.sqrt(400))
    with BitLedger(tmp_path / "bits.db") as ledger:
        ledger.set_limit("tenant", "pose", 7 * CHANNEL.bits_per_image)
        for _ in range(2):
            assert made.charge(ledger, tenant="tenant", images=IMAGES) == pytest.approx(3 * CHANNEL.bits_per_image)
        with pytest.raises(BitBudgetExceededError):
            made.charge(ledger, tenant="tenant", images=IMAGES)
        assert ledger.spent("tenant", "pose") == pytest.approx(6 * CHANNEL.bits_per_image)


def test_a_feature_that_nothing_bounds_has_no_such_release():
    with pytest.raises(ConfigError, match="nothing bounds the feature of 'pose'"):
        PublishedRelease.of(encoder_record(), task_record("pose"), NoiseKey.generate())
