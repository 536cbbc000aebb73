import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from orchestrator.evaluation.attacks.base import AttackInput
from orchestrator.evaluation.attacks.linear import LinearAttack, _prepare, _Probe


def attack_input(make, *, shape, n_classes=2, n=(300, 80, 300), seed=0):
    """``make(rng, y, shape)`` embeds labels into features of that shape."""
    rng = np.random.default_rng(seed)
    parts = []
    for size in n:
        y = rng.integers(0, n_classes, size)
        parts += [make(rng, y, shape).astype(np.float32), y]
    names = ("train_z", "train_y", "validation_z", "validation_y", "test_z", "test_y")
    return AttackInput(**dict(zip(names, parts, strict=True)), n_classes=n_classes, seed=seed)


def embedded(rng, y, shape, *, n_classes=4):
    """The label moves the feature along a fixed direction each, by two standard deviations of the noise."""
    directions = np.random.default_rng(99).normal(size=(n_classes, *shape)) / np.sqrt(np.prod(shape))
    return rng.normal(size=(len(y), *shape)) / np.sqrt(np.prod(shape)) * 2 + 2 * directions[y]


def noise(rng, y, shape):
    return rng.normal(size=(len(y), *shape))


@pytest.mark.parametrize("shape", [(16, 2, 2), (64, 8, 8), (40,)])
def test_a_label_that_is_linearly_embedded_is_read(shape):
    result = LinearAttack().run(attack_input(embedded, shape=shape, n_classes=4))
    assert result.accuracy > 0.95
    assert result.bits > 1.5


def test_noise_is_read_at_chance_and_gives_no_bits():
    result = LinearAttack().run(attack_input(noise, shape=(32, 4, 4), n=(300, 80, 2000)))
    assert abs(result.accuracy - 0.5) < 0.04
    assert result.bits < 0.01


def test_a_feature_that_never_changes_is_read_as_the_majority():
    given = attack_input(lambda rng, y, shape: np.ones((len(y), *shape)), shape=(4, 2, 2), n_classes=3)
    given = dataclasses.replace(given, train_y=np.where(given.train_y == 2, 1, given.train_y))
    result = LinearAttack().run(given)
    assert result.accuracy == (given.test_y == 1).mean()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_feature_does_not_matter(scale):
    plain = attack_input(embedded, shape=(16, 2, 2), n_classes=4)
    scaled = {name: getattr(plain, name) * np.float32(scale) for name in ("train_z", "validation_z", "test_z")}
    assert LinearAttack().run(dataclasses.replace(plain, **scaled)).accuracy == pytest.approx(
        LinearAttack().run(plain).accuracy, abs=0.01
    )


def test_the_solution_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 10)).astype(np.float32), rng.integers(0, 3, 200)
    probe = _Probe(10, 3, 200, "cpu")
    probe.fit(torch.from_numpy(x), torch.from_numpy(y), 0.05)
    # scikit-learn minimises C * sum of losses + ||W||^2 / 2.
    oracle = LogisticRegression(C=1 / (0.05 * 200), tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(probe.weight.detach().numpy(), oracle.coef_, atol=2e-3)


def test_rotating_wide_rows_keeps_every_inner_product():
    z = np.random.default_rng(0).normal(size=(50, 400)).astype(np.float32)
    rotated = _prepare([z[:40], z[40:]], 40, "cpu")
    direct = (z - z[:40].mean(axis=0)) / z[:40].std(axis=0) / 20
    assert rotated.shape == (50, 39)
    np.testing.assert_allclose(rotated[:40] @ rotated[:40].T, direct[:40] @ direct[:40].T, atol=1e-4)
    np.testing.assert_allclose(rotated[40:] @ rotated[:40].T, direct[40:] @ direct[:40].T, atol=1e-4)


def test_a_secret_in_a_direction_of_little_variance_is_found():
    """Stopping at the first rise of the validation loss, or a principal-component cut, would miss it."""
    mixing, weak = np.random.default_rng(3).normal(size=(200, 200)), np.random.default_rng(4).normal(size=200)
    weak /= np.linalg.norm(weak)

    def hidden(rng, y, shape):
        z = rng.normal(size=(len(y), *shape)) @ mixing
        return z - np.outer(z @ weak, weak) + np.outer(3 * (2 * y - 1), weak)  # 3 against a noise of 14 elsewhere

    assert LinearAttack().run(attack_input(hidden, shape=(200,), n=(800, 200, 400))).accuracy > 0.95


def test_the_same_input_gives_the_same_answer():
    given = attack_input(embedded, shape=(8, 2, 2), n_classes=4)
    first, second = (dataclasses.replace(LinearAttack().run(given), seconds=0.0) for _ in range(2))
    assert first == second
