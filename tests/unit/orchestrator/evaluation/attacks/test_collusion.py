import numpy as np
import pytest

from orchestrator.evaluation.attacks.collusion import joined, pairs


def test_two_tenants_attack_what_neither_of_them_bought():
    assert pairs(["a", "b", "c"], ["a", "b", "c", "s"]) == [
        (("a", "b"), "c"),
        (("a", "b"), "s"),
        (("a", "c"), "b"),
        (("a", "c"), "s"),
        (("b", "c"), "a"),
        (("b", "c"), "s"),
    ]


def test_one_tenant_alone_is_no_coalition():
    assert pairs(["a"], ["a", "s"]) == []


def test_maps_of_equal_size_are_joined_along_their_channels():
    first, second = np.zeros((3, 2, 4, 4)), np.ones((3, 5, 4, 4))
    together = joined([first, second])
    assert together.shape == (3, 7, 4, 4)
    assert (together[:, 2:] == 1).all()


@pytest.mark.parametrize("shape", [(5, 2, 2), (5,)])
def test_other_features_are_flattened_and_lose_nothing(shape):
    first, second = np.arange(96.0).reshape(3, 2, 4, 4), np.ones((3, *shape))
    together = joined([first, second])
    assert together.shape == (3, 32 + second[0].size)
    np.testing.assert_array_equal(together[:, :32], first.reshape(3, 32))


def test_one_feature_stays_as_it_is():
    z = np.zeros((3, 2, 4, 4))
    assert joined([z]) is z
