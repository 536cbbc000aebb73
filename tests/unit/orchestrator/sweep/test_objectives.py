"""Fronts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, UnknownNameError
from orchestrator.sweep.objectives import chosen_objectives, dominates, front

BOTH = chosen_objectives(("utility", "leakage"))


def test_the_front_is_what_no_other_beats():
    found = front(
        {
            "good": {"utility": 0.9, "leakage": 0.2},
            "private": {"utility": 0.7, "leakage": 0.0},
            "beaten": {"utility": 0.8, "leakage": 0.3},
            "equal": {"utility": 0.9, "leakage": 0.2},
            "unknown": {"utility": 1.0, "leakage": math.nan},
            "missing": {"utility": 1.0},
        },
        BOTH,
    )
    assert found == ["good", "private", "equal"]


def test_without_dp_is_worse_than_any_epsilon_and_still_a_choice():
    objectives = chosen_objectives(("utility", "epsilon"))
    trials = {"open": {"utility": 0.9, "epsilon": math.inf}, "private": {"utility": 0.8, "epsilon": 8.0}}
    assert front(trials, objectives) == ["open", "private"]
    assert front(trials | {"open": {"utility": 0.8, "epsilon": math.inf}}, objectives) == ["private"]


@given(st.dictionaries(st.integers(), st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_every_candidate_is_on_the_front_or_beaten_by_one_that_is(points):
    candidates = {name: {"utility": float(u), "leakage": float(leak)} for name, (u, leak) in points.items()}
    kept = front(candidates, BOTH)
    costs = {name: (-u, leak) for name, (u, leak) in points.items()}
    assert kept
    for name in candidates:
        beaten = any(dominates(costs[other], costs[name]) for other in kept)
        assert beaten == (name not in kept)


def test_an_objective_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(UnknownNameError) as caught:
        chosen_objectives(("utility", "speed"))
    assert "leakage" in str(caught.value)
    with pytest.raises(ConfigError, match="twice"):
        chosen_objectives(("utility", "utility"))
    with pytest.raises(ConfigError, match="needs an objective"):
        chosen_objectives(())
