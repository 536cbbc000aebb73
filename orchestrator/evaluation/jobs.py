"""The trainings of an evaluation as independent jobs, and what all of them may hold.

Jobs are handed to a function with the signature of `map`: the built-in one runs them here, one after another; a
cluster's runs them where there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import (
    Attack,
    AttackInput,
    AttackResult,
    FloatArray,
    ImageArray,
    LabelArray,
    TenantHead,
    attack_once,
)
from orchestrator.evaluation.attacks.collusion import Coalition, joined
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.report import AttackSummary, coalition_name
from tasks.spec import TaskSpec

Labels = Mapping[str, Mapping[str, LabelArray]]
"""Task (or other label column) to subset to class indices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackJob:
    """One training of one attacker. Small: the arrays travel once, with the function that takes jobs."""

    coalition: Coalition
    """Whose features the attacker holds."""
    target: str
    attack: Attack
    seed: int

    @property
    def feature(self) -> str:
        """What tables and progress call the attacker's input."""
        return coalition_name(self.coalition)

    @property
    def title(self) -> str:
        """What progress calls it."""
        return f"{self.attack.name} on {self.feature}, for {self.target}"

    def lost(self, reason: str) -> AttackResult:
        """What a runner answers with for a job whose process died."""
        return AttackResult(attack=self.attack.name, seed=self.seed, crashed=reason)


JobRunner = Callable[[Callable[[AttackJob], AttackResult], Sequence[AttackJob]], Iterable[AttackResult]]
"""Like `map`: applies the function to each job and yields the results in the jobs' order.

The function holds the arrays and is picklable, so a cluster stores it once and sends only jobs. A job's own failures
come back as results; a runner that loses a worker answers for its job with a crashed result.
"""

Progress = Callable[[int, int, AttackJob, AttackResult], None]
"""Called after every job with: how many are done, of how many, the job, its result."""


class Ground(NamedTuple):
    """All that attackers may hold: released features, labels of the targets, heads, images, and the rules."""

    features: Mapping[str, Mapping[str, FloatArray]]
    labels: Labels
    n_classes: Mapping[str, int]
    budget: AttackBudget
    heads: Mapping[str, TenantHead]
    images: Mapping[str, ImageArray] | None
    """Subset to (N, S, S, 3). Only those of the budget's subsets are ever handed on."""


def jobs_of(pairs: Sequence[tuple[Coalition, str]], attacks: Sequence[Attack], seeds: range) -> list[AttackJob]:
    """Every attack with every seed, pair by pair."""
    return [
        AttackJob(coalition=coalition, target=target, attack=attack, seed=seed)
        for coalition, target in pairs
        for attack in attacks
        for seed in seeds
    ]


def run_jobs(
    ground: Ground, jobs: Sequence[AttackJob], run: JobRunner, progress: Progress | None
) -> dict[tuple[Coalition, str], tuple[AttackSummary, ...]]:
    """Run them all. Attacks come in the order of their jobs; one that fails is reported as crashed, and stops none."""
    results: dict[tuple[Coalition, str], dict[str, list[AttackResult]]] = {}
    for done, (job, result) in enumerate(zip(jobs, run(partial(_run_job, ground), jobs), strict=True), start=1):
        results.setdefault((job.coalition, job.target), {}).setdefault(job.attack.name, []).append(result)
        if progress is not None:
            progress(done, len(jobs), job, result)
    return {
        pair: tuple(AttackSummary(attack=attack, results=tuple(found)) for attack, found in of_pair.items())
        for pair, of_pair in results.items()
    }


def check_classification(specs: Iterable[TaskSpec]) -> None:
    """Raise `DataError` for a task whose answer is not one of some classes: no measure here means anything for it."""
    for spec in specs:
        if spec.head != "classifier" or spec.loss != "cross_entropy":
            raise DataError(
                f"attackers answer with one of some classes, and {spec.name!r} is no classification task (head "
                f"{spec.head!r}, loss {spec.loss!r}; needed: 'classifier', 'cross_entropy'). Attack other targets, "
                "named with --targets, on an encoder whose tasks are classification tasks"
            )


def _run_job(ground: Ground, job: AttackJob) -> AttackResult:
    """What a worker does."""
    return attack_once(job.attack, partial(attack_input, ground, job), job.seed)


def attack_input(ground: Ground, job: AttackJob) -> AttackInput:
    """The job's arrays: the attacker's own subset, cut in two by the seed, and what else the budget allows."""
    z = {
        subset: joined([ground.features[task][subset] for task in job.coalition])
        for subset in (*ground.budget.subsets, "test")
    }
    y, x = ground.labels[job.target], ground.images
    rows = ground.budget.cut({subset: len(labels) for subset, labels in y.items()}, job.seed)
    return AttackInput(
        train_z=rows.of(z),
        train_y=rows.of(y),
        validation_z=z["attacker"][rows.held_out],
        validation_y=y["attacker"][rows.held_out],
        test_z=z["test"],
        test_y=y["test"],
        n_classes=ground.n_classes[job.target],
        seed=job.seed,
        device=ground.budget.device,
        head=ground.heads.get(job.target),
        train_images=None if x is None else rows.of(x),
        validation_images=None if x is None else x["attacker"][rows.held_out],
    )
