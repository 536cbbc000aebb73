"""Features that hide a label in a way of their own, for one family of attackers to find."""

import numpy as np

from orchestrator.evaluation.attacks.base import AttackInput


def attack_input(make, *, n=(300, 80, 300), n_classes=2, seed=0, **more):
    """``make(rng, y)`` hides the labels y in features."""
    rng = np.random.default_rng(seed)
    parts = {}
    for name, size in zip(("train", "validation", "test"), n, strict=True):
        y = rng.integers(0, n_classes, size)
        parts |= {f"{name}_y": y, f"{name}_z": make(rng, y).astype(np.float32)}
    return AttackInput(**parts, n_classes=n_classes, seed=seed, **more)


def noise(*shape):
    return lambda rng, y: rng.normal(size=(len(y), *shape))


def exclusive_or(*shape, margin=1.0):
    """The label is whether two coordinates differ in sign; each alone says nothing."""

    def make(rng, y):
        z = 0.4 * rng.normal(size=(len(y), *shape))
        first = rng.integers(0, 2, len(y))
        for channel, bits in enumerate((first, first ^ y)):
            z[:, channel] += margin * (2 * bits - 1).reshape(-1, *(1,) * (len(shape) - 1))
        return z

    return make


def rings(rng, y):
    """The label is the distance from the centre, in every direction."""
    angle = rng.normal(size=(len(y), 4))
    return (1 + y)[:, None] * angle / np.linalg.norm(angle, axis=1, keepdims=True) + 0.05 * rng.normal(size=(len(y), 4))
