"""The control tells a luck from a leak: attackers read of dealt features what the own label tells, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.attacks.mlp import MlpAttack
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.control import dealt, with_control
from orchestrator.evaluation.leakage import TaskFeatures, evaluate_leakage
from orchestrator.privacy.bounded.channel import ChannelConfig
from tasks.spec import TaskSpec

SIZES = {"attacker": 400, "test": 1000}
BUDGET = AttackBudget(attacks=(LinearAttack(), MlpAttack(epochs=5, min_steps=200)), seeds=2)


@pytest.fixture
def world():
    """The feature of ``own`` shows both labels plainly; the secret is the own label in three of four images."""
    rng = np.random.default_rng(0)
    own = {subset: rng.integers(0, 2, n) for subset, n in SIZES.items()}
    secret = {s: np.where(rng.random(len(y)) < 0.75, y, rng.integers(0, 2, len(y))) for s, y in own.items()}
    specs = {name: TaskSpec(name=name, target=name, classes=("0", "1")) for name in ("own", "secret")}
    features = {}
    for subset, n in SIZES.items():
        z = rng.normal(size=(n, 4, 1, 1)).astype(np.float32)
        z[:, 0, 0, 0] += 6 * own[subset]
        z[:, 1, 0, 0] += 6 * secret[subset]
        features[subset] = z
    channel = ChannelConfig(dimensions=4, noise=0.5)
    given = {"own": TaskFeatures(spec=specs["own"], features=features, channel=channel)}
    return given, {"own": own, "secret": secret}, specs


def test_of_dealt_features_attackers_read_the_floor_and_no_more(world):
    calls = []
    report = evaluate_leakage(*world, budget=BUDGET, seed=3)
    found = with_control(report, *world, progress=lambda done, total, job, result: calls.append((done, total)))
    (row,) = found.rows
    assert row.leak > 0.98
    assert 0.84 < row.floor.accuracy < 0.92
    assert row.luck == pytest.approx(row.floor.accuracy, abs=0.03)
    assert [summary.attack for summary in row.control] == ["linear", "mlp"]
    assert calls[-1] == (4, 4)
    assert (row.leak, row.excess, row.bound) == (report.rows[0].leak, report.rows[0].excess, report.rows[0].bound)
    assert row.to_json()["luck"] == row.luck
    assert len(row.to_json()["control"]) == 2


def test_without_a_control_there_is_no_luck(world):
    (row,) = evaluate_leakage(*world, budget=BUDGET, seed=3).rows
    assert row.luck is None
    assert row.to_json()["control"] == []


def test_features_are_dealt_within_a_subset_and_an_own_label(world):
    features, labels, _ = world
    given = features["own"]
    found = dealt(given, labels, seed=3)
    for subset, z in given.features.items():
        moved = found.features[subset]
        own = labels["own"][subset]
        for label in (0, 1):
            before, after = (np.sort(x[own == label, 2, 0, 0]) for x in (z, moved))
            np.testing.assert_array_equal(before, after)
        assert (z == moved).all(axis=(1, 2, 3)).mean() < 0.05
    assert found.channel is None
    again, other = dealt(given, labels, seed=3), dealt(given, labels, seed=4)
    np.testing.assert_array_equal(found.features["test"], again.features["test"])
    assert not np.array_equal(found.features["test"], other.features["test"])


def test_features_of_a_task_without_classes_are_dealt_among_all(world):
    features, labels, _ = world
    found = dealt(features["own"], {"secret": labels["secret"]}, seed=3)
    of_ones = labels["own"]["test"] == 1
    before, after = (np.sort(x["test"][of_ones, 2, 0, 0]) for x in (features["own"].features, found.features))
    assert not np.array_equal(before, after)
