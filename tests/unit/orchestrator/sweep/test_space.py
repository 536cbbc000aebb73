"""What flags say about a space, and the points that come of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.sweep.space import Dimension, Point, Space, parse_dimension


def space(**dimensions: str) -> Space:
    told = {"omega": "0", "epsilon": "4", "split_index": "5", "feature_bits": "none", "seed": "0"} | dimensions
    return Space(**{name: parse_dimension(name, text) for name, text in told.items()})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("omega", "0,1e-3, 1e-2", (0.0, 1e-3, 1e-2)),
        ("epsilon", "1,2,none", (1.0, 2.0, None)),
        ("split_index", "choice:5,6", (5, 6)),
        ("feature_bits", "None", (None,)),
    ],
)
def test_a_list_is_a_choice(name, text, expected):
    assert parse_dimension(name, text) == Dimension(name=name, values=expected)


@pytest.mark.parametrize("text", ["loguniform:1e-4:1", "log-uniform:1e-4:1"])
def test_a_range_is_drawn_from(text):
    found = parse_dimension("omega", text)
    assert (found.kind, found.low, found.high) == ("loguniform", 1e-4, 1.0)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("omega", "", "the space is empty"),
        ("omega", ",", "the space is empty"),
        ("omega", "1,1", "twice"),
        ("omega", "-1", "must be >= 0"),
        ("omega", "none", "no value none"),
        ("omega", "much", "not a number"),
        ("omega", "nan", "not finite"),
        ("omega", "uniform:1:0", "LOW below HIGH"),
        ("omega", "uniform:1", "LOW below HIGH"),
        ("omega", "loguniform:0:1", "must be > 0"),
        ("omega", "normal:0:1", "known: choice, uniform, loguniform"),
        ("epsilon", "0,1", "must be > 0"),
        ("epsilon", "uniform:0:1", "must be > 0"),
        ("split_index", "5.5", "not a whole number"),
        ("split_index", "uniform:5:7", "whole numbers from a list"),
        ("feature_bits", "0", "must be > 0"),
        ("seed", "-1", "must be >= 0"),
    ],
)
def test_what_is_no_space_is_refused_with_what_is(name, text, said):
    with pytest.raises(ConfigError) as caught:
        parse_dimension(name, text)
    assert said in str(caught.value)
    assert "--" + name.replace("_", "-") in str(caught.value)


def test_a_grid_has_every_combination_once_and_trials_of_one_encoder_side_by_side():
    points = space(omega="0,1e-3,1e-2", epsilon="1,2,none", split_index="5,6,7", seed="0,1").grid()
    assert len(points) == len(set(points)) == 54
    encoders = [(p.split_index, p.epsilon, p.seed) for p in points]
    changes = sum(a != b for a, b in zip(encoders, encoders[1:], strict=False))
    assert changes == 17, "18 encoders, each for three omegas in a row"


def test_random_draws_configurations_within_the_ranges_each_with_every_seed_and_the_same_again():
    drawn = space(omega="loguniform:1e-4:1", epsilon="1,none", seed="0,1")
    points = drawn.random(20, seed=3)
    assert points == drawn.random(20, seed=3) != drawn.random(20, seed=4)
    assert len(points) == 40
    assert all(1e-4 <= p.omega <= 1 for p in points)
    assert {p.epsilon for p in points} == {1.0, None}
    logs = sorted(math.log10(p.omega) for p in points)
    assert logs[len(logs) // 2] < -1, "on a logarithmic scale half of them are below the middle of it, 0.01, or near"
    assert {p.seed for p in points if p.omega == points[0].omega} == {0, 1}


def test_random_does_not_repeat_itself_where_the_space_is_small():
    assert len(space(omega="0,1").random(50, seed=0)) == 2


@given(
    omega=st.floats(0, 1e3),
    epsilon=st.none() | st.floats(1e-3, 100),
    split_index=st.integers(1, 9),
    feature_bits=st.none() | st.floats(0.1, 64),
    seed=st.integers(0, 2**31),
)
def test_a_point_survives_json(**values):
    point = Point(**values)
    assert Point.from_json(point.to_json()) == point
