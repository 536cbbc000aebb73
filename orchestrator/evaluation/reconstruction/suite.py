"""Every attacker on every feature, as independent jobs (SPEC E.4, R1 to R3).

Plain arrays in, a `ReconstructionReport` out. Jobs are handed to a function with the signature of `map`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor, nn

from orchestrator.errors import DataError, UnknownNameError
from orchestrator.evaluation.attacks.base import FloatArray, LabelArray
from orchestrator.evaluation.floors import chance_rate, label_floor
from orchestrator.evaluation.reconstruction.base import ReconstructionInput, Reconstructor, pixels
from orchestrator.evaluation.reconstruction.baselines import class_mean, mean_image, nearest_image
from orchestrator.evaluation.reconstruction.budget import ReconstructionBudget
from orchestrator.evaluation.reconstruction.judge import Judge, train_judge
from orchestrator.evaluation.reconstruction.metrics import compare
from orchestrator.evaluation.reconstruction.report import (
    Recognised,
    ReconstructionReport,
    ReconstructionResult,
    ReconstructionRow,
    ReconstructionSummary,
    SemanticTarget,
)
from orchestrator.sampling import derive_seed
from tasks.datasets.table import ImageArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownFeature:
    """A feature that somebody gets to see."""

    features: Mapping[str, FloatArray] = field(repr=False)
    """Subset to (N, C, H, W) or (N, D) float."""
    network: nn.Module | None = field(default=None, repr=False)
    """Pixels in [0, 1] to the feature (a `PixelNetwork`), for attackers who hold the weights."""
    task: str | None = None
    """Whose feature it is: its label sets the floor of every other target. None for the encoder's own output."""
    answers: Mapping[str, LabelArray] | None = field(default=None, repr=False)
    """Subset to (N,): the class that the task's own head names. None where there is no head, or no class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionJob:
    """One attempt. Small: arrays travel once, with the function that takes jobs."""

    feature: str
    attack: Reconstructor
    seed: int
    from_answer: bool = False
    """In place of the feature, the attack gets the class that the task's own head names, as a one-hot vector."""

    @property
    def title(self) -> str:
        """What progress calls it."""
        return f"{self.attack.name} on {'the answer of ' if self.from_answer else ''}{self.feature}"

    def lost(self, reason: str) -> ReconstructionResult:
        """What a runner answers with for a job whose process died."""
        return ReconstructionResult(attack=self.attack.name, seed=self.seed, crashed=reason)


JobRunner = Callable[
    [Callable[[ReconstructionJob], ReconstructionResult], Sequence[ReconstructionJob]], Iterable[ReconstructionResult]
]
_Attempt = tuple[str, str, bool]
"""(feature, attack, from_answer)."""
Progress = Callable[[int, int, ReconstructionJob, ReconstructionResult], None]
"""Called after every job with: how many are done, of how many, the job, its result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ground:
    """What every job works on; test rows are in one random order, so that the first n of them are a sample."""

    shown: Mapping[str, ShownFeature]
    images: Mapping[str, ImageArray]
    labels: Mapping[str, Mapping[str, LabelArray]]
    judge: Judge | None
    budget: ReconstructionBudget
    seed: int
    n_examples: int

    @property
    def test_rows(self) -> LabelArray:
        order = np.random.default_rng(derive_seed(self.seed, "rows", "test")).permutation(len(self.images["test"]))
        return order[: self.budget.max_test]


def evaluate_reconstruction(
    shown: Mapping[str, ShownFeature],
    images: Mapping[str, ImageArray],
    labels: Mapping[str, Mapping[str, LabelArray]],
    n_classes: Mapping[str, int],
    *,
    budget: ReconstructionBudget,
    seed: int,
    run: JobRunner = map,
    progress: Progress | None = None,
    n_examples: int = 0,
) -> ReconstructionReport:
    """Try to get the images back from every feature.

    ``images`` maps subsets to (N, S, S, 3) uint8 and ``labels`` targets to subsets to class indices: what the judge is
    asked about; none means no R3 and no ``perceptual_proxy``. A task's own label is no target for its feature. The
    first ``n_examples`` reconstructions are kept as pictures; by default none is. An attack that fails does not stop
    the others. Raises `DataError` or `UnknownNameError` where arrays are missing or do not fit.
    """
    _check(shown, images, labels, n_classes, budget)
    known = {t: np.concatenate([labels[t][s] for s in budget.subsets]) for t in labels}
    seen = np.concatenate([images[s] for s in budget.subsets])
    judge = train_judge(seen, known, n_classes, config=budget.judge, seed=seed) if labels and budget.judge else None
    ground = _Ground(
        shown=shown, images=images, labels=labels, judge=judge, budget=budget, seed=seed, n_examples=n_examples
    )
    jobs = [
        ReconstructionJob(feature=feature, attack=attack, seed=seed + repeat, from_answer=from_answer)
        for feature, given in shown.items()
        for attack in budget.attacks
        for from_answer in (False, True)
        if not from_answer or (attack.name in budget.from_answer and given.answers is not None)
        for repeat in range(budget.seeds)
    ]
    results: dict[_Attempt, list[ReconstructionResult]] = {}
    for done, (job, result) in enumerate(zip(jobs, run(partial(_run_job, ground), jobs), strict=True), start=1):
        results.setdefault((job.feature, job.attack.name, job.from_answer), []).append(result)
        if progress is not None:
            progress(done, len(jobs), job, result)
    return ReconstructionReport(
        rows=tuple(_row(ground, feature, results) for feature in shown),
        budget=budget,
        seed=seed,
        originals=images["test"][ground.test_rows[:n_examples]] if n_examples else None,
    )


def _run_job(ground: _Ground, job: ReconstructionJob) -> ReconstructionResult:
    """What a worker does. Whatever an attack raises becomes a result that is marked as crashed."""
    started = time.perf_counter()
    try:
        data = _attack_input(ground, job.feature, job.seed, from_answer=job.from_answer)
        images = job.attack.run(data)
        return _scored(ground, job, data, images, time.perf_counter() - started)
    except Exception as error:
        return ReconstructionResult(
            attack=job.attack.name,
            seed=job.seed,
            seconds=time.perf_counter() - started,
            crashed=f"{type(error).__name__}: {error}",
        )


def _scored(
    ground: _Ground, job: ReconstructionJob, data: ReconstructionInput, images: Tensor, seconds: float
) -> ReconstructionResult:
    n = len(images)
    originals = pixels(data.test_x[:n])
    feature_map = None if ground.judge is None else ground.judge.features
    keep = ground.n_examples
    return ReconstructionResult(
        attack=job.attack.name,
        seed=job.seed,
        scores=compare(images, originals, feature_map=feature_map),
        mean_image=compare(mean_image(data, n), originals),
        class_mean=None if (guess := _class_mean(ground, job.feature, data, n)) is None else compare(guess, originals),
        recognised=_recognised(ground, job.feature, images),
        seconds=seconds,
        examples=_as_stored(images[:keep]) if keep else None,
    )


def _recognised(ground: _Ground, feature: str, images: Tensor) -> tuple[Recognised, ...]:
    if ground.judge is None:
        return ()
    labels = _test_labels(ground, feature, len(images))
    counts = ground.judge.correct(images, labels)
    return tuple(Recognised(target=t, correct=counts[t], total=len(images)) for t in labels)


def _test_labels(ground: _Ground, feature: str, n: int) -> dict[str, LabelArray]:
    """Of the first ``n`` test rows, for every target but the feature's own task."""
    rows = ground.test_rows[:n]
    return {t: y["test"][rows] for t, y in ground.labels.items() if t != ground.shown[feature].task}


def _as_stored(images: Tensor) -> ImageArray:
    stored: ImageArray = (255 * images).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return stored


def _attack_input(ground: _Ground, feature: str, seed: int, *, from_answer: bool = False) -> ReconstructionInput:
    shown, x, budget = ground.shown[feature], ground.images, ground.budget
    z = _one_hot(shown.answers) if from_answer and shown.answers is not None else shown.features
    rows = budget.cut({subset: len(images) for subset, images in x.items()}, seed)
    return ReconstructionInput(
        train_z=rows.of(z),
        train_x=rows.of(x),
        validation_z=z["attacker"][rows.held_out],
        validation_x=x["attacker"][rows.held_out],
        test_z=z["test"][ground.test_rows],
        test_x=x["test"][ground.test_rows],
        seed=seed,
        network=None if from_answer else shown.network,
        device=budget.device,
    )


def _one_hot(answers: Mapping[str, LabelArray]) -> dict[str, FloatArray]:
    """Subset to (N, K)."""
    classes = np.eye(1 + max(int(y.max()) for y in answers.values()), dtype=np.float32)
    return {subset: classes[y] for subset, y in answers.items()}


def _class_mean(ground: _Ground, feature: str, data: ReconstructionInput, n: int) -> Tensor | None:
    """None where no head answers."""
    answers = ground.shown[feature].answers
    if answers is None:
        return None
    rows = ground.budget.cut({subset: len(images) for subset, images in ground.images.items()}, data.seed)
    return class_mean(data, n, known=rows.of(answers), asked=answers["test"][ground.test_rows])


def _row(ground: _Ground, feature: str, results: Mapping[_Attempt, list[ReconstructionResult]]) -> ReconstructionRow:
    data = _attack_input(ground, feature, ground.seed)
    originals = pixels(data.test_x)
    feature_map = None if ground.judge is None else ground.judge.features
    guess = _class_mean(ground, feature, data, len(originals))
    keep = ground.n_examples
    return ReconstructionRow(
        feature=feature,
        mean_image=compare(mean_image(data, len(originals)), originals, feature_map=feature_map),
        nearest_image=compare(nearest_image(data, len(originals)), originals, feature_map=feature_map),
        class_mean=None if guess is None else compare(guess, originals, feature_map=feature_map),
        class_mean_examples=None if guess is None or not keep else _as_stored(guess[:keep]),
        attacks=tuple(
            ReconstructionSummary(
                attack=attack.name,
                results=tuple(results[feature, attack.name, False]),
                from_answer=_from_answer(results, feature, attack.name),
            )
            for attack in ground.budget.attacks
        ),
        targets=_targets(ground, feature, originals),
    )


def _from_answer(
    results: Mapping[_Attempt, list[ReconstructionResult]], feature: str, attack: str
) -> ReconstructionSummary | None:
    found = results.get((feature, attack, True))
    return None if found is None else ReconstructionSummary(attack=attack, results=tuple(found))


def _targets(ground: _Ground, feature: str, originals: Tensor) -> tuple[SemanticTarget, ...]:
    if ground.judge is None:
        return ()
    labels = _test_labels(ground, feature, len(originals))
    counts = ground.judge.correct(originals, labels)
    return tuple(
        SemanticTarget(
            target=target, real=counts[target] / len(originals), baseline=_baseline(ground, feature, target, y)
        )
        for target, y in labels.items()
    )


def _baseline(ground: _Ground, feature: str, target: str, test_y: LabelArray) -> float:
    """What needs no feature: a guess, or what the label of the feature's own task gives away."""

    def known(name: str) -> LabelArray:
        return np.concatenate([ground.labels[name][s] for s in ground.budget.subsets])

    chance, own = chance_rate(known(target), test_y), ground.shown[feature].task
    if own is None or own not in ground.labels:
        return chance
    own_test = ground.labels[own]["test"][ground.test_rows]
    return max(chance, label_floor((known(own), known(target)), (own_test, test_y)).accuracy)


def _check(
    shown: Mapping[str, ShownFeature],
    images: Mapping[str, ImageArray],
    labels: Mapping[str, Mapping[str, LabelArray]],
    n_classes: Mapping[str, int],
    budget: ReconstructionBudget,
) -> None:
    """Everything is there, and rows match, before hours are spent."""
    if not shown:
        raise DataError("there is nothing to reconstruct images from: no feature was given")
    for subset in (*budget.subsets, "test"):
        if not (n := len(images.get(subset, ()))):
            raise DataError(f"the images lack the subset {subset}")
        for feature, given in shown.items():
            if (got := len(given.features.get(subset, ()))) != n:
                raise DataError(f"{got} {subset} features of {feature!r} but {n} images")
            if given.answers is not None and (got := len(given.answers.get(subset, ()))) != n:
                raise DataError(f"{got} {subset} answers of the head of {feature!r} but {n} images")
        for target, by_subset in labels.items():
            if target not in n_classes:
                raise UnknownNameError("target", target, n_classes)
            if (got := len(by_subset.get(subset, ()))) != n:
                raise DataError(f"{got} {subset} labels of {target!r} but {n} images")
