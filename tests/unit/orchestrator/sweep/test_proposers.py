"""Optuna, asked and told."""

from __future__ import annotations

import math

import pytest

from orchestrator.sweep.proposers import OptunaProposer, optuna_values
from orchestrator.sweep.records import Trial, trial_id
from orchestrator.sweep.settings import SpaceSettings, SweepSettings
from orchestrator.sweep.space import Point

SETTINGS = SweepSettings(
    private="who",
    tasks=("pose",),
    search="optuna",
    trials=12,
    objectives=("utility", "epsilon"),
    space=SpaceSettings(omega="loguniform:1e-4:1", epsilon="1,2,none", split_index="5,6"),
)


def proposer(settings=SETTINGS, known=()) -> OptunaProposer:
    return OptunaProposer(settings, width=2, resolve=settings.resolved, known=known)


def trial(point: Point) -> Trial:
    values = {"utility": 1 - abs(math.log10(point.omega) + 2), "epsilon": point.epsilon or math.inf}
    return Trial(id=trial_id(point), point=point, status="done", values=values)


def drive(proposing: OptunaProposer) -> list[Point]:
    found = []
    while (point := proposing.propose()) is not None:
        found.append(point)
        proposing.told(trial(point))
    return found


def test_it_proposes_as_many_as_it_may_all_different_and_the_same_again():
    found = drive(proposer())
    assert len(found) == len(set(found)) == 12
    assert found == drive(proposer())
    assert all(1e-4 <= p.omega <= 1 and p.epsilon in (1.0, 2.0, None) and p.split_index in (5, 6) for p in found)


def test_what_is_known_counts_and_is_not_proposed_again():
    before = drive(proposer())[:5]
    after = drive(proposer(known=[trial(point) for point in before]))
    assert len(after) == 7 and not set(after) & set(before)


def test_it_ends_where_a_small_space_is_searched():
    import dataclasses

    small = dataclasses.replace(SETTINGS, trials=50, space=SpaceSettings(omega="0.1,1", epsilon="1,none"))
    assert len(drive(proposer(small))) <= 4


def test_what_failed_is_told_as_failed_and_infinity_as_a_large_number():
    point = Point(omega=1.0, epsilon=None, split_index=5, feature_bits=None, seed=0)
    assert optuna_values(trial(point), SETTINGS.chosen) == [pytest.approx(-1.0), 1e9]
    failed = Trial(id="x", point=point, status="failed", values={"utility": 0.5, "epsilon": 1.0})
    assert optuna_values(failed, SETTINGS.chosen) is None
    lacking = Trial(id="x", point=point, status="done", values={"utility": math.nan, "epsilon": 1.0})
    assert optuna_values(lacking, SETTINGS.chosen) is None
