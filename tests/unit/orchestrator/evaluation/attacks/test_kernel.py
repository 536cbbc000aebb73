import dataclasses

import numpy as np
import pytest
from hidden_labels import attack_input, noise, rings
from sklearn.svm import SVC

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.kernel import NearestAttack, SvmAttack, _logits, _Model, _principal
from orchestrator.evaluation.attacks.linear import LinearAttack

ATTACKS = pytest.mark.parametrize("attack", [SvmAttack(), NearestAttack()], ids=["svm", "knn"])


@ATTACKS
def test_the_distance_from_the_centre_is_read_where_no_linear_attacker_can(attack):
    given = attack_input(rings)
    assert attack.run(given).accuracy > 0.95
    assert LinearAttack().run(given).accuracy < 0.65


@ATTACKS
def test_scattered_clusters_are_read_from_maps_of_many_coordinates(attack):
    """Each class is eight points, in no order that a plane could separate."""
    centres = np.random.default_rng(9).normal(size=(3, 8, 16, 2, 2))

    def clustered(rng, y):
        return centres[y, rng.integers(0, 8, len(y))] + 0.2 * rng.normal(size=(len(y), 16, 2, 2))

    result = attack.run(attack_input(clustered, n_classes=3))
    assert result.accuracy > 0.95
    assert result.bits > 1.2


@ATTACKS
def test_noise_is_read_at_chance(attack):
    result = attack.run(attack_input(noise(16, 2, 2), n=(300, 80, 2000)))
    assert abs(result.accuracy - 0.5) < 0.04
    assert result.bits < 0.02


@ATTACKS
def test_the_seed_decides_which_rows_are_kept(attack):
    given = attack_input(rings, n=(200, 80, 200))
    few = dataclasses.replace(attack, max_rows=40)
    first, again = (dataclasses.replace(few.run(given), seconds=0) for _ in range(2))
    assert first == again
    assert few.run(dataclasses.replace(given, seed=1)).bits != first.bits


@ATTACKS
def test_a_feature_that_never_changes_and_one_known_class_give_the_majority(attack):
    given = attack_input(lambda rng, y: np.ones((len(y), 4)), n=(40, 20, 60))
    known = dataclasses.replace(given, train_y=np.zeros(40, np.int64), validation_y=np.zeros(20, np.int64))
    assert attack.run(known).accuracy == (given.test_y == 0).mean()


def test_two_classes_are_answered_as_the_machine_answers():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.integers(0, 2, 60)
    logits = _logits(_Model(False, SVC), x, y, x, n_classes=2)
    np.testing.assert_array_equal(logits.argmax(axis=1), SVC().fit(x, y).predict(x))


def test_a_class_that_was_never_seen_is_never_the_answer():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), 2 * rng.integers(0, 2, 60)
    assert (_logits(_Model(False, SVC), x, y, x, n_classes=4)[:, [1, 3]].max(axis=1) < 0).all()


def test_components_keep_every_distance_where_there_are_enough_of_them():
    z = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    turned = _principal(z, 40, 64, seed=0)
    direct = (z - z[:40].mean(axis=0)) / z[:40].std(axis=0)
    assert turned.shape == (50, 6)
    np.testing.assert_allclose(turned @ turned.T, direct @ direct.T, atol=1e-3)


def test_no_neighbours_are_refused():
    with pytest.raises(ConfigError, match="neighbours must be at least 1"):
        NearestAttack(neighbours=0)
