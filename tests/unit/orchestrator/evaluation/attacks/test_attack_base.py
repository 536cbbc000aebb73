import math

import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, attack_once, entropy_bits, score


def data(*, n=8, value=0.0, labels=(0, 1), n_classes=2):
    z = np.full((n, 3), value, dtype=np.float32)
    y = np.resize(np.array(labels, dtype=np.int64), n)
    return AttackInput(
        train_z=z, train_y=y, validation_z=z, validation_y=y, test_z=z, test_y=y, n_classes=n_classes, seed=5
    )


def test_a_perfect_attacker_reads_the_whole_entropy_of_the_label():
    given = data(labels=(0, 1, 2, 3), n_classes=4)
    logits = 50 * np.eye(4, dtype=np.float32)[given.test_y]
    result = score("perfect", given, validation_logits=logits, test_logits=logits, seconds=1.0)
    assert (result.correct, result.total, result.accuracy, result.auc) == (8, 8, 1.0, 1.0)
    assert result.bits == pytest.approx(2.0, abs=1e-6)


def test_an_attacker_without_an_opinion_reads_no_bits():
    given = data()
    logits = np.zeros((8, 2), dtype=np.float32)
    result = score("none", given, validation_logits=logits, test_logits=logits, seconds=0.0)
    assert result.bits == 0.0
    assert result.auc == 0.5


def test_bits_are_not_lost_to_overconfidence_and_never_negative():
    given = data(n=100)
    answers = given.test_y.copy()
    answers[:10] = 1 - answers[:10]
    logits = 1000 * np.eye(2, dtype=np.float32)[answers]
    result = score("loud", given, validation_logits=logits, test_logits=logits, seconds=0.0)
    h = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert result.bits == pytest.approx(1 - h, abs=0.01)  # the capacity of a channel that errs in one case of ten
    wrong = 1000 * np.eye(2, dtype=np.float32)[1 - given.test_y]
    right = 1000 * np.eye(2, dtype=np.float32)[given.test_y]
    assert score("w", given, validation_logits=right, test_logits=wrong, seconds=0.0).bits == 0.0


def test_entropy_is_that_of_the_label_frequencies():
    assert entropy_bits(np.array([0, 0, 0, 3])) == pytest.approx(0.811278, abs=1e-6)


def test_answers_that_are_not_finite_are_a_crash_and_not_an_accuracy():
    class Diverging:
        name = "diverging"

        def run(self, given):
            logits = np.full((len(given.test_y), 2), np.nan, dtype=np.float32)
            return score(self.name, given, validation_logits=logits, test_logits=logits, seconds=0.0)

    result = attack_once(Diverging(), data, seed=5)
    assert result.crashed is not None
    assert "diverged" in result.crashed
    assert math.isnan(result.accuracy)
    assert result.to_json()["accuracy"] is None


def test_input_that_cannot_be_attacked_is_reported_as_a_crash():
    class Sleeper:
        name = "sleeper"

        def run(self, given):
            return AttackResult(attack=self.name, seed=given.seed, accuracy=0.5)

    assert attack_once(Sleeper(), data, seed=5).crashed is None
    result = attack_once(Sleeper(), lambda: data(value=np.nan), seed=5)
    assert result.crashed == "DataError: the attack's train features hold NaN or infinity"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"labels": (0, 2)}, "labels run from 0 to 2"), ({"labels": (-1, 0)}, "from -1"), ({"n": 0}, "0 features")],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        data(**change)
