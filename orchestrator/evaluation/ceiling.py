"""What could be read if nothing were held back: the same attackers on the universal feature u = E(x) (SPEC E.2)."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import FloatArray, ImageArray
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.jobs import Ground, JobRunner, Labels, Progress, check_classification, jobs_of, run_jobs
from orchestrator.evaluation.report import Ceiling
from tasks.spec import TaskSpec

UNIVERSAL = ("u",)


def measure_ceilings(
    universal: Mapping[str, FloatArray],
    labels: Labels,
    specs: Mapping[str, TaskSpec],
    *,
    budget: AttackBudget,
    seed: int,
    image_accuracy: Mapping[str, float],
    images: Mapping[str, ImageArray] | None = None,
    run: JobRunner = map,
    progress: Progress | None = None,
) -> tuple[Ceiling, ...]:
    """One per target. ``universal`` is u by subset, ``image_accuracy`` that of networks trained on images, by target.

    The attackers get the rows, seeds and settings that they get on released features, and no tenant's head.
    """
    check_classification(specs[target] for target in labels)
    for subset in (*budget.subsets, "test"):
        for target, by_subset in labels.items():
            if len(universal[subset]) != len(by_subset[subset]):
                raise DataError(
                    f"{len(universal[subset])} {subset} universal features but {len(by_subset[subset])} labels of "
                    f"{target!r}"
                )
    n_classes = {target: specs[target].n_outputs for target in labels}
    ground = Ground({UNIVERSAL[0]: universal}, labels, n_classes, budget, {}, images)
    jobs = jobs_of([(UNIVERSAL, target) for target in labels], budget.attacks, range(seed, seed + budget.seeds))
    results = run_jobs(ground, jobs, run, progress)
    return tuple(
        Ceiling(target=target, attacks=results[UNIVERSAL, target], images=image_accuracy.get(target))
        for target in labels
    )
