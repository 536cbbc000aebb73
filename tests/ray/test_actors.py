"""The same session on Ray: the same numbers, the same errors, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
from contextlib import contextmanager

import pytest
from tiny import tiny_training_data

from orchestrator.checkpoint import weights_hash
from orchestrator.errors import NonFiniteLossError, PartyLostError, ProtocolError
from orchestrator.ports import Ready
from orchestrator.runs import phase_two
from orchestrator.runs.observer import SilentObserver
from orchestrator.runs.opening import open_parties
from orchestrator.runs.phase_two import run_session
from orchestrator.session import Session
from orchestrator.settings.shared import RuntimeSettings

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray leaves a socket to its log monitor for the interpreter to close.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HERE = RuntimeSettings(engine="process", threads=1, device="cpu")
RAY = RuntimeSettings(engine="ray", threads=1, device="cpu")


def test_the_same_seed_gives_the_same_result_in_process_and_on_ray(tiny_plan):
    here = run_session(tiny_plan, HERE, SilentObserver())
    on_ray = run_session(tiny_plan, RAY, SilentObserver())
    for a, b in zip(here.epochs, on_ray.epochs, strict=True):
        assert a.losses == pytest.approx(b.losses, abs=1e-6)
        assert a.dissimilarity == pytest.approx(b.dissimilarity, abs=1e-6)
    assert weights_hash(here.weights) == weights_hash(on_ray.weights)
    assert here.test == on_ray.test


def test_bounded_features_have_the_same_noise_in_process_and_on_ray(bounded_plan):
    here = run_session(bounded_plan, HERE, SilentObserver())
    on_ray = run_session(bounded_plan, RAY, SilentObserver())
    assert weights_hash(here.weights) == weights_hash(on_ray.weights)
    assert here.test == on_ray.test
    shown = []
    for runtime in (HERE, RAY):
        with open_parties(bounded_plan, runtime) as (producer, _):
            parts = producer.features(0), producer.evaluation_features("test")
            shown.append([batches["left"].result().features.tobytes() for batches in parts])
    assert shown[0] == shown[1]


def test_a_session_on_ray_goes_on_from_a_state_that_was_saved_in_process(tiny_plan):
    whole = run_session(tiny_plan, HERE, SilentObserver())
    first = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, epochs=1, schedule="constant"))
    both = dataclasses.replace(first, config=dataclasses.replace(first.config, epochs=2))
    half = run_session(first, HERE, SilentObserver())
    resumed = run_session(both, RAY, SilentObserver(), state=half.state)
    straight = run_session(both, HERE, SilentObserver())
    assert weights_hash(resumed.weights) == weights_hash(straight.weights)
    assert weights_hash(resumed.weights) != weights_hash(whole.weights)


def test_a_partys_error_arrives_as_itself(tiny_plan):
    with open_parties(tiny_plan, RAY) as (producer, consumers):
        with pytest.raises(ProtocolError, match="step 3"):
            producer.features(3)["left"].result()
        batches = producer.features(0)
        with pytest.raises(ProtocolError, match="no labels"):
            consumers[0].learn(batches[consumers[0].task]).result()


def test_an_error_of_a_consumer_reaches_the_driver_through_the_producer(tiny_plan):
    plan = dataclasses.replace(tiny_plan, config=dataclasses.replace(tiny_plan.config, lr=1e30))
    with pytest.raises(NonFiniteLossError) as caught:
        run_session(plan, RAY, SilentObserver())
    assert caught.value.task in {"bright", "left", "dissimilarity"}


def test_a_party_that_is_killed_is_reported_as_lost(tiny_plan):
    with open_parties(tiny_plan, RAY) as (_, consumers):
        victim = consumers[0]
        pid = victim.process_id()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PartyLostError, match=f"consumer of task {victim.task!r} died"):
            victim.public_key().result()


class Killer(SilentObserver):
    """Kills the process of one party when a step was applied."""

    def __init__(self, plan, who: str, step: int) -> None:
        self.plan, self.who, self.step, self.told = plan, who, step, []

    def on_stage(self, title: str) -> None:
        self.told.append(title)

    def on_step(self, report) -> None:
        if report.step == self.step and not self.told:
            os.kill(self.pids[self.who], signal.SIGKILL)


@pytest.mark.parametrize("who", ["producer", "left"])
def test_a_party_that_is_killed_is_started_again_and_nothing_changes_in_the_end(tiny_plan, who, monkeypatch):
    undisturbed = run_session(tiny_plan, HERE, SilentObserver())
    killer = Killer(tiny_plan, who, step=4)

    @contextmanager
    def watched(plan, runtime, **rest):
        with open_parties(plan, runtime, **rest) as (producer, consumers):
            killer.pids = {"producer": producer.process_id(), **{c.task: c.process_id() for c in consumers}}
            yield producer, consumers

    monkeypatch.setattr(phase_two, "open_parties", watched)
    disturbed = run_session(tiny_plan, RAY, killer)
    assert any("going on from step" in line for line in killer.told)
    assert weights_hash(disturbed.weights) == weights_hash(undisturbed.weights)
    assert [e.losses for e in disturbed.epochs] == [pytest.approx(e.losses, abs=1e-6) for e in undisturbed.epochs]
    assert disturbed.test == undisturbed.test


class Broken:
    """A tenant on Ray that sends nothing but NaN, or whose process raises."""

    def __init__(self, consumer, *, raises: bool) -> None:
        self._consumer, self._raises, self.task = consumer, raises, consumer.task

    def __getattr__(self, name):
        return getattr(self._consumer, name)

    def learn(self, batch):
        if self._raises:
            wrong = dataclasses.replace(batch.result(), subset="validation", step=7)
            return self._consumer.learn(Ready(wrong))
        answer = self._consumer.learn(batch).result()
        return Ready(dataclasses.replace(answer, gradient=answer.gradient * float("nan")))


@pytest.mark.parametrize("raises", [False, True], ids=["NaN", "raises"])
def test_a_tenant_is_in_quarantine_and_the_other_is_trained_to_the_same_bytes(tiny_plan, raises):
    alone = dataclasses.replace(tiny_plan, data=tiny_training_data(("bright",)))
    expected = run_session(alone, HERE, SilentObserver())
    with open_parties(tiny_plan, RAY) as (producer, consumers):
        parties = [Broken(c, raises=raises) if c.task == "left" else c for c in consumers]
        session = Session(producer, parties, steps_per_epoch=tiny_plan.steps_per_epoch, epochs=2)
        session.start()
        session.run()
        outcome = session.finish()
    assert ("step 7" if raises else "NaN or infinity") in outcome.quarantined["left"]
    assert outcome.test == expected.test
    assert all(outcome.weights[name].equal(value) for name, value in expected.weights.items())


def test_closing_ends_every_process_of_the_session(tiny_plan):
    import psutil

    with open_parties(tiny_plan, RAY) as (producer, consumers):
        pids = [party.process_id() for party in (producer, *consumers)]
        assert all(psutil.pid_exists(pid) for pid in pids)
    for pid in pids:
        try:
            psutil.Process(pid).wait(timeout=30)
        except psutil.NoSuchProcess:
            continue
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_consumers_process_is_given_its_own_feature_and_no_other(tiny_plan):
    """Each task's batch is an object of its own: the reference that a consumer gets holds one feature."""
    with open_parties(tiny_plan, RAY) as (producer, _):
        batches = producer.features(0)
        for task, pending in batches.items():
            assert pending.result().contract.task == task
        assert len({pending.reference.hex() for pending in batches.values()}) == len(batches)
