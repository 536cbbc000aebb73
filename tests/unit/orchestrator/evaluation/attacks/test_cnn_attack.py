import dataclasses

import numpy as np
import pytest
import torch

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import AttackInput
from orchestrator.evaluation.attacks.cnn import CnnAttack, small_cnn
from orchestrator.evaluation.attacks.linear import LinearAttack

SMALL = CnnAttack(width=16, epochs=1, min_steps=200, batch_size=32)


def exclusive_or(shape, *, n=(400, 100, 400), seed=0, margin=1.0):
    """Two bits lie open in two channels; the label is whether they differ: no linear model can tell."""
    rng = np.random.default_rng(seed)
    parts = []
    for size in n:
        bits = rng.integers(0, 2, (size, 2))
        z = 0.5 * rng.normal(size=(size, *shape))
        z[:, :2] += margin * (2 * bits - 1).reshape(size, 2, *(1,) * (len(shape) - 1))
        parts += [z.astype(np.float32), (bits[:, 0] ^ bits[:, 1]).astype(np.int64)]
    names = ("train_z", "train_y", "validation_z", "validation_y", "test_z", "test_y")
    return AttackInput(**dict(zip(names, parts, strict=True)), n_classes=2, seed=seed)


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 2, 2), (4, 1, 1), (4,)])
def test_what_no_linear_attacker_can_read_is_read(shape):
    given = exclusive_or(shape, margin=1.0 if len(shape) == 3 and shape[1] > 1 else 2.0)
    assert SMALL.run(given).accuracy > 0.9
    assert LinearAttack().run(given).accuracy < 0.6


def test_what_only_the_place_in_the_map_gives_away_is_read():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 500)
    z = rng.normal(size=(500, 4, 6, 6)).astype(np.float32)
    z[np.arange(500), 0, 1, np.where(y == 1, 1, 4)] += 6
    cut = (slice(0, 300), slice(300, 350), slice(350, 500))
    given = AttackInput(
        **{f"{name}_z": z[rows] for name, rows in zip(("train", "validation", "test"), cut, strict=True)},
        **{f"{name}_y": y[rows] for name, rows in zip(("train", "validation", "test"), cut, strict=True)},
        n_classes=2,
        seed=0,
    )
    assert SMALL.run(given).accuracy > 0.9


def test_what_only_the_size_of_the_feature_gives_away_is_read():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    z = rng.normal(size=(400, 16, 2, 2)).astype(np.float32) * (1 + y).reshape(-1, 1, 1, 1).astype(np.float32)
    cut = {"train": slice(0, 200), "validation": slice(200, 250), "test": slice(250, 400)}
    parts = {f"{name}_z": z[rows] for name, rows in cut.items()} | {f"{name}_y": y[rows] for name, rows in cut.items()}
    assert SMALL.run(AttackInput(**parts, n_classes=2, seed=0)).accuracy > 0.85


def test_few_rows_get_more_steps_than_their_epochs_hold_and_that_makes_a_stronger_attacker():
    given = [dataclasses.replace(exclusive_or((8, 2, 2), n=(60, 30, 300), margin=2.0), seed=seed) for seed in range(3)]
    enough = CnnAttack(width=16, batch_size=32, min_steps=300)
    starved = dataclasses.replace(enough, min_steps=1)  # 15 epochs of 60 rows are 30 steps
    assert mean_accuracy(enough, given) > mean_accuracy(starved, given) + 0.03


def mean_accuracy(attack, given):
    return np.mean([attack.run(data).accuracy for data in given])


def test_the_scale_and_offset_of_a_channel_do_not_matter():
    plain = exclusive_or((8, 2, 2))
    scaled = {name: getattr(plain, name) * np.float32(1e-5) + 3 for name in ("train_z", "validation_z", "test_z")}
    assert SMALL.run(dataclasses.replace(plain, **scaled)).accuracy > 0.9


def test_the_seed_decides_everything_and_the_process_keeps_its_own_randomness():
    given = exclusive_or((8, 2, 2), n=(100, 50, 100))
    quick = dataclasses.replace(SMALL, min_steps=20)
    torch.manual_seed(1)
    expected_next = torch.rand(3)
    torch.manual_seed(1)
    first = quick.run(given)
    assert torch.equal(torch.rand(3), expected_next)
    torch.manual_seed(2)
    again = quick.run(given)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, seconds=0)
    other = quick.run(dataclasses.replace(given, seed=1))
    assert (other.bits, other.auc) != (first.bits, first.auc)


def test_the_rest_of_a_backbone_can_be_the_attacker():
    given = exclusive_or((512, 1, 1), n=(200, 60, 200))
    open_label = {
        f"{part}_z": getattr(given, f"{part}_z") + (2 * getattr(given, f"{part}_y") - 1).reshape(-1, 1, 1, 1) * 0.3
        for part in ("train", "validation", "test")
    }
    given = dataclasses.replace(given, **{name: z.astype(np.float32) for name, z in open_label.items()})
    attack = CnnAttack(name="cnn_backbone", backbone="resnet18", split_index=9, min_steps=60)
    assert sum(p.numel() for p in attack._network((512, 1, 1), 2, 0).parameters()) == 512 * 2 + 2
    assert attack.run(given).accuracy > 0.95


def test_a_backbone_that_does_not_take_the_feature_is_an_error_and_not_another_network():
    attack = CnnAttack(name="cnn_backbone", backbone="resnet18", split_index=6)
    with pytest.raises(ConfigError, match="takes a feature of 128 channels"):
        attack.run(exclusive_or((8, 2, 2), n=(20, 10, 10)))


def test_the_small_network_takes_maps_of_any_size():
    for side in (1, 2, 3, 4, 7, 16):
        network = small_cnn((5, side, side), 3, width=8, dropout=0.0)
        assert network(torch.zeros(2, 5, side, side)).shape == (2, 3)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="min_steps must be at least 1"):
        CnnAttack(min_steps=0)
