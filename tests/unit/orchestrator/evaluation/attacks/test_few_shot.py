import dataclasses

import numpy as np
import pytest
from hidden_labels import attack_input, noise

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import attack_once
from orchestrator.evaluation.attacks.few_shot import FewShotAttack
from orchestrator.evaluation.attacks.linear import LinearAttack


class Counting(LinearAttack):
    """Remembers how many labels it was given."""

    __slots__ = ("given",)

    def run(self, data):
        object.__setattr__(self, "given", data)
        return super().run(data)


def open_label(rng, y):
    return 2 * (2 * y - 1)[:, None, None, None] + rng.normal(size=(len(y), 4, 2, 2))


def test_fifty_labels_are_all_that_is_used_and_enough_for_what_lies_open():
    given = attack_input(open_label)
    underneath = Counting()
    result = FewShotAttack(labels=50, underneath=underneath).run(given)
    assert (len(underneath.given.train_y), len(underneath.given.validation_y)) == (40, 10)
    known = {z.tobytes() for z in [*given.train_z, *given.validation_z]}
    assert {z.tobytes() for z in underneath.given.train_z} <= known
    assert (result.attack, result.total) == ("few_50", 300)
    assert result.accuracy > 0.95


def test_fewer_labels_make_a_weaker_attacker():
    def faint(rng, y):
        return 0.15 * (2 * y - 1)[:, None] + rng.normal(size=(len(y), 40))

    given = [attack_input(faint, n=(800, 200, 500), seed=seed) for seed in range(3)]
    few, many = (np.mean([FewShotAttack(labels=labels).run(data).accuracy for data in given]) for labels in (50, 500))
    assert many > few + 0.05


def test_noise_is_read_at_chance():
    assert abs(FewShotAttack(labels=50).run(attack_input(noise(4, 2, 2), n=(80, 20, 2000))).accuracy - 0.5) < 0.05


def test_the_seed_draws_the_rows():
    given = attack_input(open_label)
    first, again = (dataclasses.replace(FewShotAttack(labels=10).run(given), seconds=0) for _ in range(2))
    assert first == again
    assert FewShotAttack(labels=10).run(dataclasses.replace(given, seed=1)).bits != first.bits


def test_more_labels_than_there_are_rows_is_skipped_and_not_crashed():
    result = attack_once(FewShotAttack(labels=500), lambda: attack_input(noise(4)), seed=0)
    assert (result.crashed, result.skipped) == (None, "there are 380 labelled rows, fewer than 500")


def test_where_validation_rows_are_scarce_more_of_the_labels_are_trained_on():
    underneath = Counting()
    FewShotAttack(labels=200, underneath=underneath).run(attack_input(open_label, n=(300, 20, 50)))
    assert (len(underneath.given.train_y), len(underneath.given.validation_y)) == (180, 20)


def test_one_label_is_refused():
    with pytest.raises(ConfigError, match="at least 2 labels"):
        FewShotAttack(labels=1)
