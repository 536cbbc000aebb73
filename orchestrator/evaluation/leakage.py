"""How much every released feature tells about every label that is not its own (SPEC E.2).

Plain arrays in, a `LeakageReport` out. The trainings are independent jobs, handed to a function with the signature of
`map`: the built-in one runs them here, one after another; a cluster's runs them where there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import nn

from orchestrator.errors import DataError, UnknownNameError
from orchestrator.evaluation.attacks.base import Attack, AttackInput, AttackResult, FloatArray, LabelArray, attack_once
from orchestrator.evaluation.attacks.swap import accuracy, head_logits, permuted_accuracy
from orchestrator.evaluation.budget import BUDGETS, AttackBudget
from orchestrator.evaluation.floors import label_floor, majority_rate
from orchestrator.evaluation.report import AttackSummary, LeakageReport, LeakageRow
from orchestrator.sampling import derive_seed
from tasks.spec import TaskSpec

__all__ = [
    "BUDGETS",
    "AttackBudget",
    "AttackJob",
    "JobRunner",
    "LeakageReport",
    "LeakageRow",
    "TaskFeatures",
    "evaluate_leakage",
]

Labels = Mapping[str, Mapping[str, LabelArray]]
"""Task (or other label column) to subset to class indices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFeatures:
    """One task's feature, as its tenant would receive it, and the head that was trained on it."""

    spec: TaskSpec
    private: bool = False
    """The feature is never released. It is no attacker's input; its label is every attacker's target."""
    features: Mapping[str, FloatArray] = field(repr=False)
    """Subset to (N, C, H, W) or (N, D) float32. Needed: test, and the subsets the attackers train on."""
    head: nn.Module | None = field(default=None, repr=False)
    """M_i; None where it cannot be had, such as a remote tenant's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackJob:
    """One training of one attacker. Small: the arrays travel once, with the function that takes jobs."""

    feature: str
    target: str
    attack: Attack
    seed: int


JobRunner = Callable[[Callable[[AttackJob], AttackResult], Sequence[AttackJob]], Iterable[AttackResult]]
"""Like `map`: applies the function to each job and yields the results in the jobs' order.

The function holds the arrays and is picklable, so a cluster stores it once and sends only jobs. A job's own failures
come back as results; a runner that loses a worker answers for its job with a crashed result.
"""

Progress = Callable[[int, int, AttackJob, AttackResult], None]
"""Called after every job with: how many are done, of how many, the job, its result."""


class _Ground(NamedTuple):
    """All that attackers may hold: released features, labels of the targets, and the rules."""

    features: Mapping[str, Mapping[str, FloatArray]]
    labels: Labels
    n_classes: Mapping[str, int]
    budget: AttackBudget


def evaluate_leakage(
    features: Mapping[str, TaskFeatures],
    labels: Labels,
    specs: Mapping[str, TaskSpec],
    *,
    budget: AttackBudget,
    seed: int,
    run: JobRunner = map,
    progress: Progress | None = None,
) -> LeakageReport:
    """Attack every released feature for every other target.

    ``labels`` names the targets: all tasks, the private one included, and any other label column; ``specs`` says what
    they are. Raises `DataError` or `UnknownNameError` where arrays are missing or do not fit. An attack that fails
    does not stop the evaluation: it is reported as crashed.
    """
    _check(features, labels, specs, budget)
    released = {task: f.features for task, f in features.items() if not f.private}
    pairs = [(feature, target) for feature in released for target in labels if target != feature]
    jobs = [
        AttackJob(feature=feature, target=target, attack=attack, seed=seed + repeat)
        for feature, target in pairs
        for attack in budget.attacks
        for repeat in range(budget.seeds)
    ]
    ground = _Ground(released, labels, {target: specs[target].n_outputs for target in labels}, budget)
    results: dict[tuple[str, str, str], list[AttackResult]] = {}
    for done, (job, result) in enumerate(zip(jobs, run(partial(_run_job, ground), jobs), strict=True), start=1):
        results.setdefault((job.feature, job.target, job.attack.name), []).append(result)
        if progress is not None:
            progress(done, len(jobs), job, result)
    return LeakageReport(
        rows=tuple(_row(features, ground, feature, target, results, seed) for feature, target in pairs),
        own={task: _own_accuracy(f, labels) for task, f in features.items()},
        private=frozenset(task for task, f in features.items() if f.private),
        targets=tuple(labels),
        budget=budget,
        seed=seed,
    )


def _run_job(ground: _Ground, job: AttackJob) -> AttackResult:
    """What a worker does."""
    return attack_once(job.attack, partial(_attack_input, ground, job), job.seed)


def _attack_input(ground: _Ground, job: AttackJob) -> AttackInput:
    z, y = ground.features[job.feature], ground.labels[job.target]
    n = len(y["attacker"])
    order = np.random.default_rng(derive_seed(job.seed, "attacker validation")).permutation(n)
    cut = max(1, round(ground.budget.validation_fraction * n))
    held_out, kept = order[:cut], order[cut:]
    more = ground.budget.subsets[1:]
    return AttackInput(
        train_z=np.concatenate([z["attacker"][kept], *(z[subset] for subset in more)]),
        train_y=np.concatenate([y["attacker"][kept], *(y[subset] for subset in more)]),
        validation_z=z["attacker"][held_out],
        validation_y=y["attacker"][held_out],
        test_z=z["test"],
        test_y=y["test"],
        n_classes=ground.n_classes[job.target],
        seed=job.seed,
        device=ground.budget.device,
    )


def _row(
    features: Mapping[str, TaskFeatures],
    ground: _Ground,
    feature: str,
    target: str,
    results: Mapping[tuple[str, str, str], list[AttackResult]],
    seed: int,
) -> LeakageRow:
    known = {
        task: np.concatenate([ground.labels[task][s] for s in ground.budget.subsets]) for task in (feature, target)
    }
    test_i, test_j = ground.labels[feature]["test"], ground.labels[target]["test"]
    swap, swap_perm = _swap(features[feature], features.get(target), test_j, ground.n_classes[target], seed)
    return LeakageRow(
        feature=feature,
        target=target,
        n_test=len(test_j),
        swap=swap,
        swap_perm=swap_perm,
        attacks=tuple(
            AttackSummary(attack=attack.name, results=tuple(results[feature, target, attack.name]))
            for attack in ground.budget.attacks
        ),
        chance=majority_rate(known[target], test_j),
        floor=label_floor((known[feature], known[target]), (test_i, test_j)),
    )


def _swap(
    source: TaskFeatures, other: TaskFeatures | None, test_y: LabelArray, n_classes: int, seed: int
) -> tuple[float | None, float | None]:
    """Accuracy of the other task's head on this feature, as it is and renamed; None where it does not fit."""
    z = source.features["test"]
    if other is None or other.head is None or "test" not in other.features:
        return None, None
    if other.features["test"].shape[1:] != z.shape[1:]:
        return None, None
    predictions = head_logits(other.head, z).argmax(axis=1)
    renamed = permuted_accuracy(predictions, test_y, n_predicted=n_classes, n_true=n_classes, seed=seed)
    return accuracy(predictions, test_y), renamed


def _own_accuracy(task: TaskFeatures, labels: Labels) -> float | None:
    if task.head is None or "test" not in task.features or task.spec.name not in labels:
        return None
    return accuracy(head_logits(task.head, task.features["test"]).argmax(axis=1), labels[task.spec.name]["test"])


def _check(
    features: Mapping[str, TaskFeatures], labels: Labels, specs: Mapping[str, TaskSpec], budget: AttackBudget
) -> None:
    """Everything is there, and rows match, before hours are spent."""
    if not any(target != task for task, given in features.items() if not given.private for target in labels):
        raise DataError(
            "there is nothing to attack: it takes a released feature and a label that is not its own task's "
            f"(features: {', '.join(sorted(features)) or 'none'}; labels: {', '.join(sorted(labels)) or 'none'})"
        )
    needed = (*budget.subsets, "test")
    for target, by_subset in labels.items():
        if target not in specs:
            raise UnknownNameError("task", target, specs)
        if missing := [subset for subset in needed if len(by_subset.get(subset, ())) == 0]:
            raise DataError(f"the labels of {target!r} lack the subset(s) {', '.join(missing)}")
    for task, given in features.items():
        if given.spec.name != task or (task not in labels and not given.private):
            raise DataError(
                f"the features of {task!r} need labels of the same name; labels: {', '.join(sorted(labels))}"
            )
        if not given.private and (missing := [subset for subset in needed if subset not in given.features]):
            raise DataError(f"the features of {task!r} lack the subset(s) {', '.join(missing)}")
        for target, by_subset in labels.items():
            for subset in given.features.keys() & set(needed):
                if (n := len(given.features[subset])) != len(by_subset[subset]):
                    raise DataError(
                        f"{n} {subset} features of {task!r} but {len(by_subset[subset])} labels of {target!r}"
                    )
