"""How much every released feature tells about every label that is not its own (SPEC E.2).

Plain arrays in, a `LeakageReport` out. The trainings themselves are independent jobs, see `jobs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from orchestrator.errors import DataError, UnknownNameError
from orchestrator.evaluation.attacks.base import FloatArray, ImageArray, LabelArray, TenantHead, entropy_bits
from orchestrator.evaluation.attacks.collusion import Coalition, pairs
from orchestrator.evaluation.attacks.swap import accuracy, head_logits, permuted_accuracy
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.floors import Floor, chance_rate, label_floor
from orchestrator.evaluation.jobs import (
    Ground,
    JobRunner,
    Labels,
    Progress,
    check_classification,
    jobs_of,
    run_jobs,
)
from orchestrator.evaluation.report import AttackSummary, LeakageReport, LeakageRow, coalition_name
from orchestrator.evaluation.row_bounds import capacity_row_bound, label_shares, rate_row_bound
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.rate import RateBound
from tasks.spec import TaskSpec


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
    channel: ChannelConfig | None = None
    """Through which the feature was released; None where nothing bounds it."""
    rate: RateBound | None = None
    """What was measured to go through it on the test rows; None where it was not."""


def evaluate_leakage(
    features: Mapping[str, TaskFeatures],
    labels: Labels,
    specs: Mapping[str, TaskSpec],
    *,
    budget: AttackBudget,
    seed: int,
    images: Mapping[str, ImageArray] | None = None,
    run: JobRunner = map,
    progress: Progress | None = None,
) -> LeakageReport:
    """Attack every released feature for every other target, and every two of them together if the budget says so.

    ``labels`` names the targets: all tasks, the private one included, and any other label column, but not those of
    tasks that answer with a map, whose features are attacked all the same; ``specs`` says what they are. ``images``
    (subset to (N, S, S, 3)) are those that attackers own; without them some attacks are skipped. Raises `DataError` or
    `UnknownNameError` where arrays are missing or do not fit, or a target has no classes. An attack that fails does not
    stop the evaluation: it is reported as crashed.
    """
    _check(features, labels, specs, budget, images)
    released = {task: f.features for task, f in features.items() if not f.private}
    alone: list[tuple[Coalition, str]] = [((f,), target) for f in released for target in labels if target != f]
    together = pairs(list(released), list(labels)) if budget.collusion else []
    seeds = range(seed, seed + budget.seeds)
    jobs = jobs_of(alone, budget.attacks, seeds) + jobs_of(together, budget.collusion, seeds)
    n_classes = {target: specs[target].n_outputs for target in labels}
    ground = Ground(released, labels, n_classes, budget, _heads(features), images)
    results = run_jobs(ground, jobs, run, progress)
    own = {task: own_accuracy(f, labels) for task, f in features.items()}

    def row(coalition: Coalition, target: str) -> LeakageRow:
        return _row(features, ground, coalition, target, results[coalition, target], seed, own)

    return LeakageReport(
        rows=tuple(row(*pair) for pair in alone),
        collusion=tuple(row(*pair) for pair in together),
        own=own,
        private=frozenset(task for task, f in features.items() if f.private),
        targets=tuple(labels),
        budget=budget,
        seed=seed,
    )


def _heads(features: Mapping[str, TaskFeatures]) -> dict[str, TenantHead]:
    """Of every task whose head is to be had, as the swap test uses them too."""
    return {
        task: TenantHead(module=given.head, feature_shape=given.features["test"].shape[1:])
        for task, given in features.items()
        if given.head is not None and "test" in given.features
    }


def _row(
    features: Mapping[str, TaskFeatures],
    ground: Ground,
    coalition: Coalition,
    target: str,
    attacks: tuple[AttackSummary, ...],
    seed: int,
    own: Mapping[str, float | None],
) -> LeakageRow:
    """``own`` is the accuracy of every task's own head."""
    joint = _joint_labels(ground, coalition)
    known_j = np.concatenate([ground.labels[target][s] for s in ground.budget.subsets])
    test_i, test_j = joint["test"], ground.labels[target]["test"]
    swap = swap_perm = None
    if len(coalition) == 1:
        other = features.get(target)
        swap, swap_perm = _swap(features[coalition[0]], other, test_j, ground.n_classes[target], seed)
    channels = [features[task].channel for task in coalition]
    rates = [features[task].rate for task in coalition]
    head = own[coalition[0]] if len(coalition) == 1 else None
    return LeakageRow(
        feature=coalition_name(coalition),
        target=target,
        n_test=len(test_j),
        swap=swap,
        swap_perm=swap_perm,
        attacks=attacks,
        chance=chance_rate(known_j, test_j),
        chance_balanced=1 / len(np.unique(test_j)),
        target_bits=entropy_bits(test_j),
        floor=_floor(ground, coalition, target),
        target_shares=tuple(label_shares(test_j)),
        bound=capacity_row_bound(channels, test_j),
        rate_bound=rate_row_bound(channels, rates, test_i, test_j, own=head),
    )


def _floor(ground: Ground, coalition: Coalition, target: str) -> Floor:
    """From all that a coalition's labels say, or from one: of many that are seldom seen together little is learned."""
    subsets, wanted = ground.budget.subsets, ground.labels[target]
    known_j = np.concatenate([wanted[s] for s in subsets])
    found = []
    for members in {coalition, *((task,) for task in coalition if task in ground.labels)}:
        labels = _joint_labels(ground, members)
        known_i = np.concatenate([labels[s] for s in subsets])
        found.append(label_floor((known_i, known_j), (labels["test"], wanted["test"])))
    return Floor(*(max(floor[n] for floor in found) for n in range(2)))


def _joint_labels(ground: Ground, coalition: Coalition) -> Mapping[str, LabelArray]:
    """Subset to one number for all that the coalition's own labels say together; 0 where none is a class."""
    labelled = [task for task in coalition if task in ground.labels]
    sizes = tuple(ground.n_classes[task] for task in labelled)
    subsets = (*ground.budget.subsets, "test")
    if not labelled:
        some = next(iter(ground.labels.values()))
        return {subset: np.zeros(len(some[subset]), dtype=np.int64) for subset in subsets}
    return {
        subset: np.ravel_multi_index(tuple(ground.labels[task][subset] for task in labelled), sizes).astype(np.int64)
        for subset in subsets
    }


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


def own_accuracy(task: TaskFeatures, labels: Labels) -> float | None:
    """Of the task's own head on the test rows; None without a head, or labels."""
    if task.head is None or "test" not in task.features or task.spec.name not in labels:
        return None
    return accuracy(head_logits(task.head, task.features["test"]).argmax(axis=1), labels[task.spec.name]["test"])


def _check(
    features: Mapping[str, TaskFeatures],
    labels: Labels,
    specs: Mapping[str, TaskSpec],
    budget: AttackBudget,
    images: Mapping[str, ImageArray] | None,
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
        if images is not None:
            _check_images(images, {subset: len(by_subset[subset]) for subset in budget.subsets})
    check_classification(specs[target] for target in labels)
    for task, given in features.items():
        if given.spec.name != task or (task not in labels and not given.private and not given.spec.dense):
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


def _check_images(images: Mapping[str, ImageArray], sizes: Mapping[str, int]) -> None:
    for subset, n in sizes.items():
        if len(images.get(subset, ())) != n:
            raise DataError(f"{len(images.get(subset, ()))} {subset} images but {n} labels; need one image each")
