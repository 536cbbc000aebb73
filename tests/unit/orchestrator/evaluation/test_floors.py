import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from orchestrator.evaluation.floors import chance_rate, clopper_pearson, label_floor


def rows(table):
    """(y_i, y_j) from a table of counts."""
    pairs = [(i, j) for i, line in enumerate(table) for j, count in enumerate(line) for _ in range(count)]
    given_y, target = zip(*pairs, strict=True)
    return np.array(given_y), np.array(target)


@pytest.mark.parametrize(
    ("known", "test", "expected"),
    [
        pytest.param([1, 1, 0], [1, 1, 1, 0], 3 / 4, id="the commonest known class is common"),
        pytest.param([1, 1, 0], [0, 0, 0, 1], 1 / 2, id="it is rare: a draw does better"),
        pytest.param([0, 0, 3, 5], [3, 3, 5, 5, 5, 0], 1 / 3, id="a class that nobody knows of is not drawn"),
        pytest.param([0, 1], [2, 2, 2, 1], 1 / 8, id="test rows of unknown classes are never guessed"),
    ],
)
def test_chance_is_the_better_of_always_the_commonest_and_a_draw(known, test, expected):
    assert chance_rate(np.array(known), np.array(test)) == pytest.approx(expected)


def test_the_floor_is_that_of_the_table_worked_out_by_hand():
    known = rows([[30, 10], [20, 40]])  # y_i = 0 -> 0, y_i = 1 -> 1
    test = rows([[6, 4], [3, 7]])
    floor = label_floor(known, test)
    assert floor.accuracy == pytest.approx(13 / 20)
    assert floor.balanced_accuracy == pytest.approx((6 / 9 + 7 / 11) / 2)


def test_the_balanced_floor_answers_with_the_likelier_class_and_not_with_the_commoner():
    known = rows([[60, 2], [30, 8]])  # the majority is 0 for either y_i, but 1 is over-represented where y_i = 1
    floor = label_floor(known, known)
    assert floor.accuracy == pytest.approx(0.9)
    assert floor.balanced_accuracy == pytest.approx((60 / 90 + 8 / 10) / 2)


def test_a_label_that_was_never_seen_falls_back_to_the_majority():
    floor = label_floor(rows([[5, 1], [1, 8]]), (np.array([2, 2, 2]), np.array([1, 1, 0])))
    assert floor.accuracy == pytest.approx(2 / 3)


def test_a_task_determines_a_coarser_one():
    digit = np.arange(100) % 10
    assert label_floor((digit, digit % 2), (digit, digit % 2)) == (1.0, 1.0)


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_interval_is_the_exact_one_of_scipy(total, share):
    correct = round(share * total)
    oracle = binomtest(correct, total).proportion_ci(0.95, method="exact")
    assert clopper_pearson(correct, total) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_the_interval_of_nothing_right_is_the_textbook_one():
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
