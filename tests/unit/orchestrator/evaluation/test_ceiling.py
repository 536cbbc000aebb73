import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.adapter import AdapterAttack
from orchestrator.evaluation.attacks.linear import LinearAttack
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.ceiling import measure_ceilings
from tasks.spec import TaskSpec

SIZES = {"attacker": 200, "test": 400}
BUDGET = AttackBudget(attacks=(LinearAttack(), AdapterAttack()), seeds=2)


@pytest.fixture
def world():
    """u shows a plainly and b not at all."""
    rng = np.random.default_rng(0)
    labels = {name: {subset: rng.integers(0, 2, n) for subset, n in SIZES.items()} for name in "ab"}
    universal = {}
    for subset, n in SIZES.items():
        z = rng.normal(size=(n, 4, 2, 2))
        z[:, 0] += 4 * labels["a"][subset][:, None, None]
        universal[subset] = z.astype(np.float32)
    return universal, labels, {name: TaskSpec(name=name, target=name, classes=("0", "1")) for name in "ab"}


def test_the_ceiling_is_what_the_same_attackers_read_of_the_universal_feature(world):
    calls = []
    found = measure_ceilings(
        *world,
        budget=BUDGET,
        seed=3,
        image_accuracy={"b": 0.9},
        progress=lambda done, total, job, result: calls.append((done, total, job.feature, job.target, job.seed)),
    )
    a, b = found
    assert a.target == "a"
    assert a.accuracy > 0.95
    assert (a.images, b.images, b.accuracy) == (None, 0.9, 0.9)
    assert b.best.mean("accuracy") < 0.6
    assert [summary.attack for summary in a.attacks] == ["linear", "adapter"]
    assert a.attacks[1].skipped
    assert calls[0] == (1, 8, "u", "a", 3)
    assert len(calls) == 8


def test_rows_that_do_not_fit_are_refused(world):
    universal, labels, specs = world
    with pytest.raises(DataError, match="399 test universal features but 400 labels of 'a'"):
        measure_ceilings(
            {**universal, "test": universal["test"][1:]}, labels, specs, budget=BUDGET, seed=0, image_accuracy={}
        )
