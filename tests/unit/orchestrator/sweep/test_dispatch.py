"""Who may begin when: no trial before its encoder, and no encoder twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sweep.dispatch import Dispatcher, Signal
from orchestrator.sweep.proposers import ListProposer
from orchestrator.sweep.recipe import Need
from orchestrator.sweep.records import Trial, failure_file, trial_file, trial_id
from orchestrator.sweep.space import Point
from orchestrator.sweep.store import Store


class FakeEncoders:
    """Trainings that end when the test says so."""

    def __init__(self, *, width: int = 2) -> None:
        self.width = width
        self.begun: list[Need] = []
        self.finished: set[Need] = set()
        self.problems: dict[Need, str] = {}

    def settle(self) -> list[Need]:
        return []

    def state(self, need: Need) -> str:
        if need in self.problems:
            return "failed"
        if need in self.finished:
            return "ready"
        return "training" if need in self.begun else "missing"

    @property
    def has_room(self) -> bool:
        return sum(self.state(need) == "training" for need in self.begun) < self.width

    def want(self, need: Need) -> None:
        if self.state(need) == "missing":
            self.begun.append(need)


def points(epsilons=(1.0, 2.0, 4.0), omegas=(0.0, 1.0, 2.0)) -> list[Point]:
    return [
        Point(omega=omega, epsilon=epsilon, split_index=5, feature_bits=None, seed=0)
        for epsilon in epsilons
        for omega in omegas
    ]


@pytest.fixture
def over() -> list[tuple[Trial, bool]]:
    return []


def dispatcher(some, encoders, store, over) -> Dispatcher:
    return Dispatcher(ListProposer(some), encoders, store, on_trial=lambda trial, before: over.append((trial, before)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def record(store: Store, point: Point) -> None:
    number = trial_id(point)
    trial = Trial(id=number, point=point, status="done", values={"utility": 0.5})
    store.write_json(trial_file(number), trial.to_json())


def test_trials_of_one_encoder_wait_for_it_and_it_is_begun_once(store, over):
    encoders = FakeEncoders()
    dispatch = dispatcher(points(), encoders, store, over)
    assert dispatch.next() is Signal.WAIT
    assert dispatch.next() is Signal.WAIT
    assert [need.epsilon for need in encoders.begun] == [1.0, 2.0], "as many as there is room for, each once"
    encoders.finished.add(encoders.begun[0])
    first = [dispatch.next() for _ in range(3)]
    assert [p.omega for p in first] == [0.0, 1.0, 2.0] and {p.epsilon for p in first} == {1.0}
    assert [need.epsilon for need in encoders.begun] == [1.0, 2.0, 4.0], "the next is made while trials run"
    assert dispatch.next() is Signal.WAIT


def test_it_ends_when_every_point_was_handed_out(store, over):
    encoders = FakeEncoders(width=1)
    some = points(epsilons=(1.0, 2.0), omegas=(0.0,))
    dispatch, handed = dispatcher(some, encoders, store, over), []
    for _ in range(20):
        encoders.finished.update(encoders.begun)
        point = dispatch.next()
        if point is Signal.END:
            break
        if isinstance(point, Point):
            record(store, point)
            dispatch.done(point)
            handed.append(point)
    assert handed == some
    assert dispatch.next() is Signal.END
    assert [(trial.status, before) for trial, before in over] == [("done", False)] * 2


def test_what_has_a_record_is_not_handed_out_and_its_encoder_is_not_made(store, over):
    some = points(epsilons=(1.0, 2.0), omegas=(0.0, 1.0))
    record(store, some[0])
    record(store, some[1])
    encoders = FakeEncoders()
    dispatch = dispatcher(some, encoders, store, over)
    assert dispatch.next() is Signal.WAIT
    assert [need.epsilon for need in encoders.begun] == [2.0]
    assert [(trial.point, before) for trial, before in over] == [(some[0], True), (some[1], True)]


def test_trials_whose_encoder_failed_are_reported_and_the_others_go_on(store, over):
    encoders = FakeEncoders()
    dispatch = dispatcher(points(epsilons=(1.0, 2.0), omegas=(0.0, 1.0)), encoders, store, over)
    dispatch.next()
    encoders.problems[encoders.begun[0]] = "it diverged"
    encoders.finished.add(encoders.begun[1])
    found = [dispatch.next() for _ in range(3)]
    assert [p.epsilon for p in found[:2]] == [2.0, 2.0] and found[2] is Signal.END
    assert [(t.status, t.problem, t.point.epsilon) for t, _ in over] == [("failed", "it diverged", 1.0)] * 2


def test_a_trial_without_a_record_has_failed_for_the_reason_it_gave_or_none(store, over):
    encoders = FakeEncoders()
    some = points(epsilons=(1.0,), omegas=(0.0, 1.0))
    dispatch = dispatcher(some, encoders, store, over)
    dispatch.next()
    encoders.finished.update(encoders.begun)
    assert [dispatch.next(), dispatch.next()] == some
    store.write_json(failure_file(trial_id(some[0])), {"problem": "MemoryError: no room"})
    assert dispatch.done(some[0]).problem == "MemoryError: no room"
    assert "process died" in dispatch.done(some[1]).problem
    assert not store.exists(trial_file(trial_id(some[0]))), "so that a resumed sweep tries it again"


def test_a_trial_that_was_stopped_is_over_for_good(store, over):
    encoders = FakeEncoders()
    some = points(epsilons=(1.0,), omegas=(0.0,))
    dispatch = dispatcher(some, encoders, store, over)
    dispatch.next()
    encoders.finished.update(encoders.begun)
    dispatch.next()
    assert dispatch.done(some[0], curve=[0.1, 0.2], stopped=True).status == "stopped"
    again = dispatcher(some, encoders, store, over)
    assert again.next() is Signal.END
    assert over[-1][1] and over[-1][0].curve == [0.1, 0.2]
