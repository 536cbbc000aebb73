"""What is asked of bounded features besides the tenants' own gradients, in a session."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny import tiny_training_data

from orchestrator.assembly import SessionPlan, build_producer
from orchestrator.checkpoint import weights_hash
from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.local import LocalConsumer, LocalProducer
from orchestrator.privacy.bounded.channel import power_normalise
from orchestrator.session import Session
from orchestrator.shaping import Secret, Shaping, ShapingPlan
from orchestrator.wire import PublicKey

THIRD = tiny_training_data(("third",)).labels["third"]["train"]
SECRETS = {"third": Secret(labels=THIRD, n_classes=3)}


def open_session(plan: SessionPlan) -> Session:
    producer = LocalProducer(plan)
    consumers = [LocalConsumer(producer.offers()[t], plan.consumer_config(t)) for t in plan.data.specs]
    session = Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=plan.config.epochs)
    session.enrol()
    return session


def shaped(plan: SessionPlan, epochs: int = 2, **terms) -> SessionPlan:
    config = dataclasses.replace(plan.config, epochs=epochs)
    return dataclasses.replace(plan, shaping=ShapingPlan(**terms), config=config)


def trained(plan: SessionPlan) -> str:
    session = open_session(plan)
    session.run()
    return weights_hash(session.producer.weights())


def test_each_term_changes_what_is_learned_and_neither_changes_nothing(bounded_plan):
    found = {
        trained(bounded_plan),
        trained(shaped(bounded_plan, rate_weight=0.3)),
        trained(shaped(bounded_plan, secret_weight=1.0, secrets=SECRETS)),
    }
    assert len(found) == 3
    off = shaped(bounded_plan, secret_weight=0.0, secrets=SECRETS)
    assert trained(off) == trained(bounded_plan)


def test_the_rate_takes_out_what_is_beyond_the_class_and_leaves_the_classes_apart(bounded_plan):
    """Vectors that are moved by nothing else: as of a module that can do whatever is asked of it."""
    y = torch.arange(64) % 2
    generator = torch.Generator().manual_seed(0)
    v = torch.where(y[:, None] == 1, 1.0, -1.0) + torch.randn(64, 4, generator=generator)
    v.requires_grad_()
    specs = {"left": bounded_plan.data.specs["left"]}
    labels = {"left": y.numpy()}
    made = Shaping(
        ShapingPlan(rate_weight=1.0),
        bounded_plan.channel,
        specs=specs,
        labels=labels,
        feature_shape=(4, 1, 1),
        total_steps=1,
        seed=0,
        device=torch.device("cpu"),
    )

    def spread_and_gap() -> tuple[float, float]:
        rows = [power_normalise(v.detach())[y == k] for k in (0, 1)]
        return float(sum(r.var(0).sum() for r in rows)), float((rows[0].mean(0) - rows[1].mean(0)).norm())

    before, optimiser = spread_and_gap(), torch.optim.Adam([v], 0.05)
    for step in range(1, 150):
        s = power_normalise(v)[:, :, None, None]
        optimiser.zero_grad()
        s.backward(made.pull({"left": s}, np.arange(64), step=step)["left"])
        optimiser.step()
    after = spread_and_gap()
    assert after[0] < 0.1 * before[0]
    assert after[1] > before[1]


def test_secrets_stay_with_the_producer(bounded_plan):
    plan = shaped(bounded_plan, secret_weight=1.0, secrets=SECRETS)
    producer = build_producer(plan)
    assert "third" not in producer.offers()
    with pytest.raises(UnknownNameError, match="no task in this session named 'third'"):
        producer.seal_labels(PublicKey(task="third", raw=bytes(32)), "train")
    assert "labels" not in repr(plan.shaping) and "labels" not in repr(SECRETS["third"])


def test_a_task_that_is_sold_is_no_secret_of_its_own_feature(bounded_plan):
    labels = bounded_plan.data.labels["left"]["train"]
    plan = ShapingPlan(secret_weight=1.0, secrets={"left": Secret(labels=labels, n_classes=2)})
    made = Shaping(
        plan,
        bounded_plan.channel,
        specs=bounded_plan.data.specs,
        labels={task: y["train"] for task, y in bounded_plan.data.labels.items()},
        feature_shape=bounded_plan.shape,
        total_steps=10,
        seed=0,
        device=torch.device("cpu"),
    )
    s = {task: torch.randn(8, 4, 1, 1) for task in ("left", "bright")}
    assert made.pull(s, np.arange(8), step=2)["bright"].abs().sum() == 0, "the task is learned a little first"
    half, whole = (made.pull(s, np.arange(8), step=step) for step in (3, 4))
    assert whole["left"].abs().sum() == 0 < half["bright"].abs().sum() < whole["bright"].abs().sum()
    assert made.pull(s, np.arange(0), step=5) == {}


def test_a_resumed_session_ends_as_one_that_was_never_interrupted(bounded_plan):
    plan = shaped(bounded_plan, rate_weight=0.1, secret_weight=1.0, secrets=SECRETS)
    whole, broken, resumed = (open_session(plan) for _ in range(3))
    whole.run()
    for _ in range(4):
        broken.train_step()
    resumed.load_state_dict(broken.state_dict())
    for _ in range(4, plan.total_steps):
        resumed.train_step()
    assert weights_hash(resumed.producer.weights()) == weights_hash(whole.producer.weights())


def test_modules_that_are_trained_already_are_not_shaped(bounded_plan):
    modules = {
        task: module.state_dict()
        for task, module in bounded_plan.network.build_modules(bounded_plan.data.specs, 16, seed=0).items()
    }
    plan = dataclasses.replace(shaped(bounded_plan, rate_weight=0.3), modules=modules)
    assert build_producer(plan)._shaping is None


def test_maps_have_no_shaping_and_weights_are_numbers(tiny_plan):
    with pytest.raises(ConfigError, match="give --task-privacy bounded"):
        dataclasses.replace(tiny_plan, shaping=ShapingPlan(rate_weight=0.1))
    for wrong in ({"rate_weight": -1.0}, {"secret_weight": float("nan")}):
        with pytest.raises(ConfigError, match="a finite number >= 0"):
            ShapingPlan(**wrong)
