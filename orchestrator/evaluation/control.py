"""A negative control: the same attackers on features that tell nothing but their own task's label.

The best of many attackers on few test rows is above what needs no feature by luck alone, and one that reads less than
the floor could be too weak to reach it. Features that are dealt anew among the images with the same own label show how
much either is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from orchestrator.evaluation.attacks.base import ImageArray
from orchestrator.evaluation.jobs import JobRunner, Labels, Progress
from orchestrator.evaluation.leakage import TaskFeatures, evaluate_leakage
from orchestrator.evaluation.report import LeakageReport
from orchestrator.sampling import derive_seed
from tasks.spec import TaskSpec


def with_control(
    report: LeakageReport,
    features: Mapping[str, TaskFeatures],
    labels: Labels,
    specs: Mapping[str, TaskSpec],
    *,
    images: Mapping[str, ImageArray] | None = None,
    run: JobRunner = map,
    progress: Progress | None = None,
) -> LeakageReport:
    """The report, with what its attackers read of features that were dealt anew; what is given is what gave it."""
    found = evaluate_leakage(
        {task: given if given.private else dealt(given, labels, seed=report.seed) for task, given in features.items()},
        labels,
        specs,
        budget=dataclasses.replace(report.budget, collusion=()),
        seed=report.seed,
        images=images,
        run=run,
        progress=progress,
    )
    rows = (dataclasses.replace(row, control=found.row(row.feature, row.target).attacks) for row in report.rows)
    return dataclasses.replace(report, rows=tuple(rows))


def dealt(given: TaskFeatures, labels: Labels, *, seed: int) -> TaskFeatures:
    """Every image with the feature of one of the same subset with the same own label, drawn without replacement.

    Nothing bounds what is left: a bound is on what a feature tells of its own image.
    """
    own = labels.get(given.spec.name, {})
    features = {}
    for subset, z in given.features.items():
        rng = np.random.default_rng(derive_seed(seed, "control", given.spec.name, subset))
        known, order = own.get(subset, np.zeros(len(z), dtype=np.int64)), np.arange(len(z))
        for label in np.unique(known):
            rows = np.flatnonzero(known == label)
            order[rows] = rng.permutation(rows)
        features[subset] = z[order]
    return dataclasses.replace(given, features=features, channel=None, rate=None)
