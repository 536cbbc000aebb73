"""The protocol between a producer and its consumers, in one process."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import TINY_NETWORK, tiny_training_data

from orchestrator.assembly import SessionPlan, build_producer
from orchestrator.checkpoint import weights_hash
from orchestrator.errors import NonFiniteLossError, PartyLostError, ProtocolError, UnknownNameError
from orchestrator.local import LocalConsumer, LocalProducer
from orchestrator.network import FeatureNetwork
from orchestrator.ports import Ready
from orchestrator.privacy.dissimilarity import Dissimilarity, DissimilarityConfig
from orchestrator.session import Session
from orchestrator.wire import FeatureGradient
from tasks.losses import cross_entropy


def open_session(plan: SessionPlan, **options) -> Session:
    producer = LocalProducer(plan)
    consumers = [LocalConsumer(producer.offers()[t], plan.consumer_config(t)) for t in plan.data.specs]
    session = Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=plan.config.epochs, **options)
    session.enrol()
    return session


def gradients_of(session: Session, step: int) -> dict[str, FeatureGradient]:
    batches = session.producer.features(step)
    return {task: consumer.learn(batches[task]).result() for task, consumer in session.consumers.items()}


def test_training_lowers_every_task_loss_and_the_heads_learn(tiny_plan):
    plan = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, epochs=12))
    reports = open_session(plan).run()
    assert len(reports) == 12
    for task in plan.data.specs:
        assert reports[-1].losses[task] < 0.5 * reports[0].losses[task]
        assert reports[-1].validation[task].metrics["accuracy"] >= 0.9


def test_one_step_equals_the_same_mathematics_in_plain_pytorch(tiny_plan):
    """Loss = sum of task losses + omega * sum over ordered pairs (eq. 6), AdamW on every module and head."""
    session = open_session(tiny_plan)
    producer = session.producer.producer
    ids = producer._sampler.ids(0)
    u = producer._source.training(0, ids)
    modules = tiny_plan.network.build_modules(tiny_plan.data.specs, 16, seed=tiny_plan.seed)
    network = FeatureNetwork(None, modules)
    heads = {}
    for task, consumer in session.consumers.items():
        heads[task] = tiny_plan.network.build_heads({task: 2}, 16, seed=0)[task]
        heads[task].load_state_dict(consumer.consumer.state_dict()["head"])
    parameters = [*network.parameters(), *(p for head in heads.values() for p in head.parameters())]
    optimiser = torch.optim.AdamW(parameters, lr=tiny_plan.config.lr, weight_decay=tiny_plan.config.weight_decay)
    z = network(u)
    loss = sum(
        cross_entropy(heads[t](z[t]), torch.from_numpy(tiny_plan.data.labels[t]["train"][ids])).mean() for t in z
    )
    omega = tiny_plan.dissimilarity.omega
    (loss + omega * Dissimilarity(tiny_plan.dissimilarity)(z, fixed=frozenset()).loss).backward()
    optimiser.step()

    report = session.train_step()

    assert sum(report.losses.values()) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(producer.weights()[name], value, rtol=1e-4, atol=1e-4)
    for task, consumer in session.consumers.items():
        for name, value in heads[task].state_dict().items():
            torch.testing.assert_close(consumer.consumer.state_dict()["head"][name], value, rtol=1e-4, atol=1e-4)


def test_the_dissimilarity_term_changes_modules_but_no_head_gradient(tiny_plan):
    """A tenant never sees the other tenants' features, so its head cannot depend on them within a step."""
    without = dataclasses.replace(tiny_plan, dissimilarity=DissimilarityConfig(omega=0.0))
    a, b = open_session(tiny_plan), open_session(without)
    ra, rb = a.train_step(), b.train_step()
    assert ra.losses == rb.losses
    assert ra.dissimilarity > 0
    assert rb.dissimilarity == 0
    assert weights_hash(a.producer.weights()) != weights_hash(b.producer.weights())
    for task in a.consumers:
        assert weights_hash(a.consumers[task].consumer.state_dict()["head"]) == weights_hash(
            b.consumers[task].consumer.state_dict()["head"]
        )


def test_frozen_means_frozen(tiny_plan):
    """Bitwise: neither the encoder nor an earlier task's module moves."""
    config = tiny_plan.network.module_config(16)
    earlier = tiny_plan.network.build_modules(["third"], 16, seed=5)["third"]
    plan = dataclasses.replace(tiny_plan, use_cache=False, fixed_modules={"third": (config, {**earlier.state_dict()})})
    session = open_session(plan)
    producer = session.producer.producer
    before = weights_hash(producer._fixed.state_dict())
    encoder = weights_hash(plan.encoder)
    session.run_epoch()
    assert weights_hash(producer._fixed.state_dict()) == before
    assert weights_hash(producer._network.encoder.state_dict()) == encoder


def test_a_joint_session_does_move_the_encoder(tiny_plan):
    plan = dataclasses.replace(tiny_plan, frozen=False)
    session = open_session(plan)
    session.run_epoch()
    assert weights_hash(session.producer.producer._network.encoder.state_dict()) != weights_hash(plan.encoder)


def test_the_cache_changes_nothing_but_rounding(tiny_plan):
    """float16 features of the frozen encoder: the first losses agree to its precision."""
    cached, direct = open_session(tiny_plan), open_session(dataclasses.replace(tiny_plan, use_cache=False))
    a, b = cached.train_step(), direct.train_step()
    for task in a.losses:
        assert a.losses[task] == pytest.approx(b.losses[task], rel=2e-3)


def test_a_repeated_step_is_answered_from_memory_and_applied_once(tiny_plan):
    session = open_session(tiny_plan)
    producer = session.producer.producer
    first = producer.features(0)
    again = producer.features(0)
    for task in first:
        assert np.array_equal(first[task].features, again[task].features)
    gradients = gradients_of(session, 0)
    repeated = gradients_of(session, 0)
    for task in gradients:
        assert np.array_equal(gradients[task].gradient, repeated[task].gradient)
    report = producer.learn(0, gradients)
    weights = weights_hash(producer.weights())
    assert producer.learn(0, gradients) == report
    assert weights_hash(producer.weights()) == weights


@pytest.mark.parametrize("step", [1, 5, -2])
def test_a_step_out_of_order_is_refused(tiny_plan, step):
    session = open_session(tiny_plan)
    with pytest.raises(ProtocolError, match="step"):
        session.producer.features(step)
    batch = session.producer.features(0)["left"].result()
    with pytest.raises(ProtocolError, match="step"):
        session.consumers["left"].learn(Ready(dataclasses.replace(batch, step=step)))


def test_an_interrupted_session_goes_on_to_the_same_end(tiny_plan):
    saved = []
    undisturbed = open_session(tiny_plan, save=lambda _, state: saved.append(state))
    reports = undisturbed.run()
    resumed = open_session(tiny_plan)
    resumed.load_state_dict(saved[0])
    last = resumed.run()[-1]
    assert last.losses == reports[-1].losses
    assert weights_hash(resumed.producer.weights()) == weights_hash(undisturbed.producer.weights())


class Mortal:
    """A party that dies at one call, before or after doing it, and comes back as it was at its start."""

    def __init__(self, build, method: str, at: int, *, after: bool = False) -> None:
        self._build, self._party = build, build()
        self._method, self._left, self._after = method, at, after
        self._dead = False
        self.deaths = 0

    def __getattr__(self, name: str):
        def call(*arguments):
            if self._dead:
                raise PartyLostError("it is dead")
            value = getattr(self._party, name)
            value = value(*arguments) if callable(value) else value
            if name == self._method:
                self._left -= 1
                if self._left == 0:
                    self._dead, self.deaths = True, self.deaths + 1
                    if not self._after:
                        raise PartyLostError("it died")
            return value

        return call if name not in {"task"} else getattr(self._party, name)

    def revive(self) -> None:
        if self._dead:
            self._dead, self._party = False, self._build()


@pytest.mark.parametrize("after", [False, True], ids=["before its answer", "after its answer"])
@pytest.mark.parametrize(
    ("who", "method", "at"),
    [
        *(("producer", method, at) for method, at in (("features", 2), ("learn", 5), ("state_dict", 2))),
        *(("producer", method, 1) for method in ("seal_labels", "weights", "state_dict")),
        *(("left", method, at) for method, at in (("learn", 1), ("learn", 4), ("state_dict", 2), ("head", 1))),
        ("left", "evaluate", 2),
    ],
)
def test_a_party_that_dies_anywhere_changes_nothing_in_the_end(tiny_plan, who, method, at, after):
    def open_mortal(victim):
        producer = LocalProducer(tiny_plan)
        offers = producer.offers()

        def consumer(task):
            return LocalConsumer(offers[task], tiny_plan.consumer_config(task))

        mortal = None
        if victim == "producer":
            mortal = producer = Mortal(lambda: LocalProducer(tiny_plan), method, at, after=after)
        consumers = [consumer(t) for t in offers]
        if victim in offers:
            mortal = Mortal(lambda: consumer(victim), method, at, after=after)
            consumers = [mortal if t == victim else consumer(t) for t in offers]
        session = Session(
            producer,
            consumers,
            steps_per_epoch=tiny_plan.steps_per_epoch,
            epochs=tiny_plan.config.epochs,
            keep_every=2,
        )
        session.start()
        reports = session.run()
        return reports, session.finish(), mortal

    undisturbed, expected, _ = open_mortal(None)
    reports, outcome, mortal = open_mortal(who)
    assert mortal.deaths == 1
    assert reports == undisturbed
    assert weights_hash(outcome.weights) == weights_hash(expected.weights)
    assert outcome.test == expected.test
    for task, head in expected.heads.items():
        for name, value in head.state.items():
            np.testing.assert_array_equal(outcome.heads[task].state[name], value)


def test_a_party_that_dies_again_and_again_ends_the_session(tiny_plan):
    class Doomed(LocalProducer):
        deaths = 0

        def learn(self, step, gradients):
            Doomed.deaths += 1
            raise PartyLostError("it died again")

    producer = Doomed(tiny_plan)
    consumers = [LocalConsumer(producer.offers()[t], tiny_plan.consumer_config(t)) for t in producer.offers()]
    session = Session(producer, consumers, steps_per_epoch=tiny_plan.steps_per_epoch, epochs=1, recoveries=2)
    session.start()
    with pytest.raises(PartyLostError, match="again"):
        session.run()
    assert Doomed.deaths == 3


def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(tiny_plan):
    """Without the guard; see test_guard.py for what happens with it."""
    config = dataclasses.replace(tiny_plan.config, guard=False)
    session = open_session(dataclasses.replace(tiny_plan, config=config))
    producer = session.producer.producer
    gradients = gradients_of(session, 0)
    before = weights_hash(producer.weights())
    for bad in (np.nan, np.inf):
        poisoned = gradients["left"].gradient.copy()
        poisoned.flat[3] = bad
        with pytest.raises(ProtocolError, match="NaN or infinity"):
            producer.learn(0, {**gradients, "left": dataclasses.replace(gradients["left"], gradient=poisoned)})
    with pytest.raises(NonFiniteLossError, match="left"):
        producer.learn(0, {**gradients, "left": dataclasses.replace(gradients["left"], loss=float("nan"))})
    with pytest.raises(ProtocolError, match="needs one gradient of each"):
        producer.learn(0, {"left": gradients["left"]})
    assert weights_hash(producer.weights()) == before
    assert producer.learn(0, gradients).step == 0


def test_a_diverging_head_is_reported_with_its_task_and_step(tiny_plan):
    plan = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, lr=1e30))
    with pytest.raises(NonFiniteLossError) as caught:
        open_session(plan).run()
    assert caught.value.task in {"bright", "left", "dissimilarity"}
    assert "no task was published" in str(caught.value)


def test_a_tenant_can_ask_for_no_labels_but_its_own(tiny_plan):
    producer = build_producer(tiny_plan)
    consumer = LocalConsumer(producer.offers()["left"], tiny_plan.consumer_config("left"))
    key = consumer.public_key().result()
    with pytest.raises(UnknownNameError):
        producer.seal_labels(dataclasses.replace(key, task="third"), "train")
    others = producer.seal_labels(dataclasses.replace(key, task="bright"), "train")
    with pytest.raises(ProtocolError):
        consumer.receive_labels(Ready(others))


def test_a_consumer_refuses_another_tasks_feature_and_ids_out_of_range(tiny_plan):
    session = open_session(tiny_plan)
    batches = {t: b.result() for t, b in session.producer.features(0).items()}
    with pytest.raises(ProtocolError):
        session.consumers["left"].learn(Ready(batches["bright"]))
    wrong = dataclasses.replace(batches["left"], example_ids=batches["left"].example_ids + 1000)
    with pytest.raises(ProtocolError, match="outside"):
        session.consumers["left"].learn(Ready(wrong))


def test_a_session_needs_exactly_one_consumer_a_task(tiny_plan):
    producer = LocalProducer(tiny_plan)
    one = LocalConsumer(producer.offers()["left"], tiny_plan.consumer_config("left"))
    with pytest.raises(ProtocolError, match="consumers bought"):
        Session(producer, [one], steps_per_epoch=1, epochs=1)


def test_a_tasks_training_does_not_depend_on_its_neighbours_without_the_dissimilarity_term(tiny_plan):
    together = dataclasses.replace(tiny_plan, dissimilarity=DissimilarityConfig(omega=0.0))
    alone = dataclasses.replace(together, data=tiny_training_data(("left",)))
    a, b = open_session(together), open_session(alone)
    assert [r.losses["left"] for r in a.run()] == [r.losses["left"] for r in b.run()]


def test_features_of_a_subset_are_those_of_its_images_in_order(tiny_plan):
    producer = build_producer(tiny_plan)
    whole = producer.evaluation_features("validation", batch_size=256)["left"]
    pieces = producer.evaluation_features("validation", batch_size=5)["left"]
    np.testing.assert_allclose(whole.features, pieces.features, rtol=1e-5, atol=1e-6)
    assert whole.features.shape == (12, *TINY_NETWORK.shape(16))
