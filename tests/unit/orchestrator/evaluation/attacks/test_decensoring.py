import dataclasses

import numpy as np
import pytest
from hidden_labels import attack_input, exclusive_or, noise

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import attack_once
from orchestrator.evaluation.attacks.decensoring import DecensoringAttack

QUICK = DecensoringAttack(width=8, translator_width=16, epochs=1, min_steps=150, batch_size=32)


def with_images(given, *, side=8):
    """Images on which the label is plain to see: the upper or the lower half is bright."""
    rng = np.random.default_rng(5)

    def drawn(y):
        images = rng.integers(0, 100, (len(y), side, side, 3))
        for label, half in enumerate((slice(0, side // 2), slice(side // 2, side))):
            images[y == label, half] += 150
        return images.astype(np.uint8)

    return dataclasses.replace(given, train_images=drawn(given.train_y), validation_images=drawn(given.validation_y))


def test_a_feature_is_translated_into_one_that_hides_nothing():
    assert QUICK.run(with_images(attack_input(exclusive_or(4, 2, 2)))).accuracy > 0.9


def test_images_that_tell_everything_do_not_help_where_the_feature_tells_nothing():
    result = QUICK.run(with_images(attack_input(noise(4, 2, 2), n=(300, 80, 2000))))
    assert abs(result.accuracy - 0.5) < 0.04
    assert result.bits < 0.02


def test_without_images_the_attack_is_skipped_and_not_crashed():
    result = attack_once(QUICK, lambda: attack_input(noise(4), n=(20, 10, 10)), seed=0)
    assert (result.crashed, result.skipped) == (None, "there are no images of the attacker's rows")


def test_the_seed_decides_everything():
    given = with_images(attack_input(exclusive_or(4), n=(60, 30, 60)))
    quick = dataclasses.replace(QUICK, min_steps=10)
    first, again = (dataclasses.replace(quick.run(given), seconds=0) for _ in range(2))
    assert first == again


def test_one_image_a_row_is_needed():
    given = with_images(attack_input(noise(4), n=(20, 10, 10)))
    with pytest.raises(DataError, match="19 images and 20 labels"):
        dataclasses.replace(given, train_images=given.train_images[1:])
