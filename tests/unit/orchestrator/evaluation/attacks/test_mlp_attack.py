import dataclasses

import pytest
from hidden_labels import attack_input, exclusive_or, noise

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.attacks.mlp import MlpAttack

SMALL = MlpAttack(width=64, epochs=1, min_steps=300, batch_size=32)


@pytest.mark.parametrize("shape", [(2,), (8,), (4, 2, 2)])
def test_whether_two_coordinates_differ_is_read_where_no_linear_attacker_can(shape):
    given = attack_input(exclusive_or(*shape, margin=2.0))
    assert SMALL.run(given).accuracy > 0.9
    assert LinearAttack().run(given).accuracy < 0.7  # three of four corners are 0.75


def test_noise_is_read_at_chance():
    result = SMALL.run(attack_input(noise(8, 2, 2), n=(300, 80, 2000)))
    assert abs(result.accuracy - 0.5) < 0.04
    assert result.bits < 0.02


def test_the_seed_decides_everything():
    given = attack_input(exclusive_or(8), n=(100, 50, 100))
    quick = dataclasses.replace(SMALL, min_steps=20)
    first, again = (dataclasses.replace(quick.run(given), seconds=0) for _ in range(2))
    assert first == again
    assert quick.run(dataclasses.replace(given, seed=1)).auc != first.auc


def test_a_network_without_width_is_refused():
    with pytest.raises(ConfigError, match="width must be at least 1"):
        MlpAttack(width=0)
