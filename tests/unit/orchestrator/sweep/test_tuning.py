"""What Tune is told, and what is made of what it says. No cluster is started."""

from __future__ import annotations

import pickle

import pytest

from orchestrator.sweep.dispatch import Signal
from orchestrator.sweep.space import Point

pytest.importorskip("ray.tune")

from ray.tune.search import Searcher

from orchestrator.sweep.tuning import DispatchSearcher

POINT = Point(omega=0.0, epsilon=2.0, split_index=5, feature_bits=None, seed=0)


class FakeDispatcher:
    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.over: list[tuple[Point, list[float], bool]] = []

    def next(self):
        return self.answers.pop(0)

    def done(self, point, *, curve=None, stopped=False) -> None:
        self.over.append((point, curve, stopped))


def searcher(dispatcher, *, limit=None, asha_epochs=4) -> DispatchSearcher:
    return DispatchSearcher(dispatcher, limit=limit, asha_epochs=asha_epochs)


def test_a_point_is_handed_over_as_plain_data_waiting_is_no_answer_and_the_end_is_the_end():
    search = searcher(FakeDispatcher(Signal.WAIT, POINT, Signal.END))
    assert search.suggest("a") is None
    assert search.suggest("a") == {"point": POINT.to_json()}
    assert search.suggest("b") == Searcher.FINISHED


def test_no_more_run_at_a_time_than_is_allowed():
    search = searcher(FakeDispatcher(POINT, Signal.END), limit=1)
    assert search.suggest("a") is not None
    assert search.suggest("b") is None, "the dispatcher is not even asked"
    search.on_trial_complete("a", {"utility": 0.5, "epoch": 1})
    assert search.suggest("c") == Searcher.FINISHED


@pytest.mark.parametrize(
    ("epochs", "error", "stopped"), [(4, False, False), (2, False, True), (1, False, True), (2, True, False)]
)
def test_a_trial_that_ends_before_its_last_epoch_without_an_error_was_stopped(epochs, error, stopped):
    dispatcher = FakeDispatcher(POINT)
    search = searcher(dispatcher)
    search.suggest("a")
    for epoch in range(1, epochs):
        search.on_trial_result("a", {"utility": epoch / 10, "epoch": epoch})
    # The result at which ASHA stops a trial comes with its end alone.
    search.on_trial_complete("a", {"utility": epochs / 10, "epoch": epochs}, error)
    assert dispatcher.over == [(POINT, [n / 10 for n in range(1, epochs + 1)], stopped)]


def test_without_asha_nothing_counts_as_stopped():
    dispatcher = FakeDispatcher(POINT)
    search = searcher(dispatcher, asha_epochs=None)
    search.suggest("a")
    search.on_trial_complete("a", None, True)
    assert dispatcher.over == [(POINT, [], False)]


def test_tune_may_pickle_it_and_keeps_nothing_of_the_dispatcher():
    assert b"FakeDispatcher" not in pickle.dumps(searcher(FakeDispatcher()))
