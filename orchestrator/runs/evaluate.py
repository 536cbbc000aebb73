"""Evaluate one published encoder: collect its features, attack them, draw what was found."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator.assembly import SessionConfig, SessionPlan
from orchestrator.baselines.alone import train_alone
from orchestrator.catalog import Catalog
from orchestrator.errors import DataError
from orchestrator.evaluation import parallel
from orchestrator.evaluation.attacks.hijack import HijackReport, measure_hijack
from orchestrator.evaluation.bounded import measure_bounded
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.ceiling import measure_ceilings
from orchestrator.evaluation.collect import Published, collect
from orchestrator.evaluation.comparison import Point, read_points
from orchestrator.evaluation.control import with_control
from orchestrator.evaluation.evaluation import Evaluation
from orchestrator.evaluation.examples import Examples
from orchestrator.evaluation.figures.pictures import may_draw
from orchestrator.evaluation.leakage import evaluate_leakage
from orchestrator.evaluation.membership import MembershipResult, attack_membership
from orchestrator.evaluation.reconstruction.budget import ReconstructionBudget
from orchestrator.evaluation.reconstruction.collect import ENCODER, collect_shown
from orchestrator.evaluation.reconstruction.report import ReconstructionReport
from orchestrator.evaluation.reconstruction.suite import evaluate_reconstruction
from orchestrator.evaluation.report import Ceiling, LeakageReport
from orchestrator.evaluation.shadows import membership_budget, membership_of
from orchestrator.evaluation.subject import Subject
from orchestrator.privacy.accounting import rounded_up
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.ledger import Account, Ledger
from orchestrator.runs.noise import noise_plan
from orchestrator.runs.observer import RunObserver
from orchestrator.settings.evaluate import EvaluateSettings

_ALONE_BATCH = 32
"""Half of the default of a session, so that in as many epochs the network to compare with takes twice the steps."""
_EXAMPLES = 8
"""Pictures a row."""

AttackProgress = Callable[[int, int, str], None]
"""Called after every attack with: how many are done, of how many, which one it was."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The numbers, and what figures need besides."""

    evaluation: Evaluation
    published: Published = field(repr=False)
    points: tuple[Point, ...]
    """This evaluation, and those that it is put beside."""
    own_examples: Examples | None = field(repr=False)
    """Pictures of this one; None where they may show people and were not asked for."""
    other_examples: tuple[Examples, ...] = field(repr=False)

    @property
    def examples(self) -> tuple[Examples, ...]:
        """All of them, this one's first."""
        return (*([] if self.own_examples is None else [self.own_examples]), *self.other_examples)


def evaluate(
    settings: EvaluateSettings,
    *,
    catalog: Catalog,
    observer: RunObserver,
    progress: AttackProgress,
    command: str,
) -> Outcome:
    """Measure what `EvaluateSettings.chosen` says. Earlier evaluations are read before hours are spent."""
    if settings.runtime.engine == "ray":
        parallel.prepare()
    published = collect(
        catalog,
        observer,
        encoder_version=settings.encoder_version,
        data=settings.data,
        targets=settings.targets,
        storage=settings.runtime.storage_path,
        threads=settings.runtime.threads,
    )
    beside = read_points(settings.compared, fingerprint=published.encoder.data_fingerprint)
    run = _Run(settings, catalog, observer, progress, published)
    evaluation = run.measured(
        Subject.of(
            published,
            catalog=catalog.name,
            account=_account(settings, published),
            command=command,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
    )
    others = [Examples.load(folder) for folder in settings.compared] if run.draws else []
    return Outcome(
        evaluation=evaluation,
        published=published,
        points=(Point.of(evaluation.to_json()), *beside),
        own_examples=run.examples(evaluation.reconstruction),
        other_examples=tuple(examples for examples in others if examples is not None),
    )


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        settings: EvaluateSettings,
        catalog: Catalog,
        observer: RunObserver,
        progress: AttackProgress,
        published: Published,
    ) -> None:
        self.settings, self.catalog, self.published = settings, catalog, published
        self.observer, self.progress = observer, progress
        self.sold = published.sold_classes
        self.draws = may_draw(published.opened.table.name, allow_people=settings.pictures)
        self.seconds: dict[str, float] = {}
        # Here, so that a name that nobody knows is refused before anything is trained.
        labels = AttackBudget.preset(settings.budget, seeds=settings.seeds)
        self.of_labels = labels.only(settings.attacks) if settings.attacks else labels
        images = ReconstructionBudget.preset(settings.budget, seeds=settings.seeds)
        self.of_images = images.only(settings.decoders) if settings.decoders else images

    def measured(self, subject: Subject) -> Evaluation:
        """Part by part. A part that fails as a whole stops the evaluation; an attack that fails is reported."""
        parts = self.settings.chosen
        alone = self._alone(self.sold, self.settings.alone) if self.settings.alone else {}
        return Evaluation(
            subject=subject,
            budget=self.settings.budget,
            alone=alone,
            leakage=self._leakage() if "leakage" in parts else None,
            bounded=measure_bounded(self.published),
            reconstruction=self._reconstruction() if "reconstruction" in parts else None,
            membership=self._membership() if "membership" in parts else None,
            hijack=self._hijack() if "hijack" in parts else None,
            seconds=self.seconds,
        )

    def examples(self, report: ReconstructionReport | None) -> Examples | None:
        """Of the encoder's own output, where pictures may be drawn."""
        if report is None or not self.draws:
            return None
        guarantee = self.published.encoder.guarantee
        epsilon = guarantee["epsilon"] or guarantee["nominal_epsilon"]
        private = "no DP" if epsilon is None else f"epsilon {rounded_up(epsilon)}"
        return Examples.of(report, ENCODER, label=f"split {self.published.encoder.split_index}, {private}")

    def _leakage(self) -> LeakageReport:
        settings, published, budget = self.settings, self.published, self.of_labels
        images = published.images(budget.subsets) if budget.needs_images else None
        with self._timed("leakage", "attacking the features"):
            report = evaluate_leakage(
                published.features,
                published.labels,
                published.specs,
                budget=budget,
                seed=settings.seed,
                images=images,
                run=self._runner(),
                progress=self._told,
            )
        if settings.control:
            with self._timed("control", "attacking features that were dealt anew"):
                report = with_control(
                    report,
                    published.features,
                    published.labels,
                    published.specs,
                    images=images,
                    run=self._runner(),
                    progress=self._told,
                )
        if settings.ceiling:
            on_images = self._alone(list(published.labels), settings.ceiling)
            with self._timed("ceilings", "attacking the universal feature"):
                report = dataclasses.replace(report, ceilings=self._ceilings(budget, on_images))
        return report

    def _ceilings(self, budget: AttackBudget, on_images: Mapping[str, float]) -> tuple[Ceiling, ...]:
        published = self.published
        return measure_ceilings(
            published.universal((*budget.subsets, "test")),
            published.labels,
            published.specs,
            budget=budget,
            seed=self.settings.seed,
            image_accuracy=on_images,
            images=published.images(budget.subsets) if budget.needs_images else None,
            run=self._runner(),
            progress=self._told,
        )

    def _reconstruction(self) -> ReconstructionReport:
        budget = self.of_images
        shown = collect_shown(
            self.catalog, self.published, subsets=(*budget.subsets, "test"), white_box=budget.needs_weights
        )
        with self._timed("reconstruction", "getting images back"):
            return evaluate_reconstruction(
                shown.shown,
                shown.images,
                shown.labels,
                shown.n_classes,
                budget=budget,
                seed=self.settings.seed,
                run=self._runner(),
                progress=self._told,
                n_examples=_EXAMPLES if self.draws else 0,
            )

    def _membership(self) -> dict[str, tuple[MembershipResult, ...]]:
        """Of every sold task whose head is here."""
        shadows = membership_budget(self.settings.budget)
        found = {}
        with self._timed("membership", "asking who was in the training set"):
            for task in self.sold:
                if self.published.features[task].head is not None:
                    asked = membership_of(
                        self.published, task, shadows=shadows, seed=self.settings.seed, run=self._runner()
                    )
                    found[task] = attack_membership(asked)
        return found

    def _hijack(self) -> tuple[HijackReport, ...]:
        """By the tenant of the first sold task, in sessions on this encoder whose other tenants are honest.

        Honest tenants have linear heads here: what they learn is not the question, and the guard sees them all the
        same. Where its feature is bounded, so are those of all.
        """
        if not self.sold:
            raise DataError("there is no tenant to hijack a session: the encoder has no task with classes that is sold")
        _, weights = self.catalog.encoder(self.published.encoder.version)
        runtime, reports = self.settings.runtime, []
        network = dataclasses.replace(self.published.network_of(self.sold[0]), head="linear")
        # Nothing of these sessions is sent to anybody, so any name that no run has will do.
        noise = noise_plan(network, self.catalog, storage=runtime.storage_path, run="a hijacking that is measured")
        for frozen in (True, False):
            plan = SessionPlan(
                data=self.published.opened.training_data(tuple(self.sold)),
                network=network,
                config=SessionConfig(),
                dissimilarity=DissimilarityConfig(omega=0.0),
                seed=self.settings.seed,
                encoder=weights,
                frozen=frozen,
                cache_root=runtime.storage_path / "features",
                device=runtime.device,
                threads=runtime.threads,
                noise=noise,
            )
            kind = "frozen" if frozen else "live"
            with self._timed(f"hijack, {kind}", f"hijacking a session, encoder {kind}"):
                reports.append(measure_hijack(plan, task=self.sold[0], seed=self.settings.seed))
        return tuple(reports)

    def _alone(self, tasks: Sequence[str], epochs: int) -> dict[str, float]:
        """Every task's whole network, trained alone on images and without any privacy: test accuracy by task."""
        table, splits = self.published.opened.table, self.published.opened.splits
        network, size, seed = self.published.network, self.published.encoder.image_size, self.settings.seed
        accuracy = {}
        for task in tasks:
            spec = table.spec(task)
            whole = nn.Sequential(
                network.build_encoder(seed=seed),
                *network.build_modules([task], size, seed=seed).values(),
                *network.build_heads({task: spec.n_outputs}, size, seed=seed).values(),
            )
            with self._timed("networks trained alone", f"training {task} alone, without privacy"):
                result = train_alone(
                    table.images,
                    table.task_labels(task),
                    normalisation=table.normalisation,
                    flip=table.flip,
                    train_ids=splits.train,
                    test_ids=splits.test,
                    network=whole,
                    spec=spec,
                    epochs=epochs,
                    batch_size=_ALONE_BATCH,
                    learning_rate=1e-3,
                    seed=seed,
                )
            accuracy[task] = result.metrics["accuracy"]
        return accuracy

    def _runner(self) -> Any:
        """`map`, or the cluster's."""
        return parallel.on_ray if self.settings.runtime.engine == "ray" else map

    def _told(self, done: int, total: int, job: Any, result: Any) -> None:
        self.progress(done, total, job.title + (" CRASHED" if result.crashed else ""))

    @contextmanager
    def _timed(self, part: str, stage: str) -> Iterator[None]:
        self.observer.on_stage(stage)
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def _account(settings: EvaluateSettings, published: Published) -> Account | None:
    """What the ledger says of these images, if there is one here and it knows them."""
    path: Path = settings.runtime.ledger_path
    if not path.exists():
        return None
    with Ledger(path) as ledger:
        known = {account.fingerprint: account for account in ledger.accounts()}
    return known.get(published.opened.table.image_set)
