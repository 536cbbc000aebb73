"""What was got back from each feature, beside what needs no feature. Accuracies and SSIM are fractions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from orchestrator.evaluation.attacks.base import jsonable
from orchestrator.evaluation.floors import clopper_pearson
from orchestrator.evaluation.reconstruction.budget import ReconstructionBudget
from orchestrator.evaluation.reconstruction.metrics import Scores
from orchestrator.evaluation.report import CLAIM_MARGIN, CLAIM_SEEDS
from tasks.datasets.table import ImageArray

SSIM_MARGIN = 0.05
"""How far above the mean image a reconstruction may be where the input is called obfuscated (SPEC E.4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recognised:
    """How many reconstructions the judge classifies rightly, for one target."""

    target: str
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Between 0 and 1."""
        return self.correct / self.total

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, with the 95 % Clopper-Pearson interval."""
        low, high = clopper_pearson(self.correct, self.total)
        return {
            "target": self.target,
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionResult:
    """What one attacker with one seed got back; or that it crashed, which says nothing about privacy."""

    attack: str
    seed: int
    scores: Scores | None = None
    mean_image: Scores | None = None
    """Of the mean image on the same rows."""
    class_mean: Scores | None = None
    """Of the mean image of the class that the task's own head names, on the same rows; None where there is no head."""
    recognised: tuple[Recognised, ...] = ()
    seconds: float = 0.0
    crashed: str | None = None
    """What went wrong."""
    examples: ImageArray | None = field(default=None, repr=False, compare=False)
    """(n, S, S, 3), the first reconstructions, where pictures were asked for. Never in `to_json`."""

    @property
    def gain(self) -> float:
        """SSIM above the mean image on the same rows; NaN after a crash."""
        if self.scores is None or self.mean_image is None:
            return math.nan
        return self.scores.ssim - self.mean_image.ssim

    def over_class(self, measure: str) -> float:
        """A measure above that of the class's mean image; NaN after a crash, or where there is none."""
        if self.scores is None or self.class_mean is None:
            return math.nan
        above: float = getattr(self.scores, measure) - getattr(self.class_mean, measure)
        return above

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "attack": self.attack,
            "seed": self.seed,
            "scores": None if self.scores is None else self.scores.to_json(),
            "mean_image": None if self.mean_image is None else self.mean_image.to_json(),
            "class_mean": None if self.class_mean is None else self.class_mean.to_json(),
            "gain": jsonable(self.gain),
            "recognised": [recognised.to_json() for recognised in self.recognised],
            "seconds": self.seconds,
            "crashed": self.crashed,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionSummary:
    """One attack over its seeds. Seeds that crashed are counted, and enter no number."""

    attack: str
    results: tuple[ReconstructionResult, ...]
    from_answer: ReconstructionSummary | None = None
    """The same attack with nothing but the head's answer; None where it was not asked for, or no head answers."""

    @property
    def completed(self) -> tuple[ReconstructionResult, ...]:
        """The results that did not crash."""
        return tuple(result for result in self.results if result.crashed is None)

    @property
    def crashed(self) -> int:
        """How many seeds crashed."""
        return len(self.results) - len(self.completed)

    def mean(self, measure: str) -> float:
        """Mean over the seeds of a measure of `Scores`; NaN if all crashed."""
        values = [getattr(result.scores, measure) for result in self.completed]
        return fmean(values) if values else math.nan

    @property
    def gain(self) -> float:
        """Mean SSIM above the mean image; NaN if all crashed."""
        return fmean(result.gain for result in self.completed) if self.completed else math.nan

    def over_class(self, measure: str) -> float:
        """Mean of a measure above the class's mean image; NaN if all crashed or there is none."""
        return fmean(result.over_class(measure) for result in self.completed) if self.completed else math.nan

    def over_answer(self, measure: str) -> float:
        """Mean of a measure above that of the same attack on the head's answer alone; NaN where there is none."""
        return math.nan if self.from_answer is None else self.mean(measure) - self.from_answer.mean(measure)

    def recognised(self, target: str) -> float:
        """Mean accuracy of the judge; NaN if all crashed."""
        values = [r.accuracy for result in self.completed for r in result.recognised if r.target == target]
        return fmean(values) if values else math.nan

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        measures = ("psnr", "ssim", "ms_ssim", "l1", "perceptual_proxy")
        return {
            "attack": self.attack,
            **{measure: jsonable(self.mean(measure)) for measure in measures},
            "gain": jsonable(self.gain),
            "psnr_over_class": jsonable(self.over_class("psnr")),
            "ssim_over_class": jsonable(self.over_class("ssim")),
            "from_answer": None if self.from_answer is None else self.from_answer.to_json(),
            "crashed": self.crashed,
            "results": [result.to_json() for result in self.results],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticTarget:
    """What the judge makes of real test images, and what is known of the target without any."""

    target: str
    real: float
    """Accuracy on the real test images: a judge that is bad at these cannot clear a reconstruction."""
    baseline: float
    """The larger of chance and the floor that the feature's own label sets."""

    @property
    def capable(self) -> bool:
        """Whether the judge knows more of real images than the baseline, by more than the margin of a claim."""
        return self.real > self.baseline + CLAIM_MARGIN


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionRow:
    """What one feature still shows of its image."""

    feature: str
    mean_image: Scores
    nearest_image: Scores
    """The best that any look-up among the attacker's images could give."""
    attacks: tuple[ReconstructionSummary, ...]
    targets: tuple[SemanticTarget, ...]
    class_mean: Scores | None = None
    """Of the mean of the attacker's images of the class that the task's own head names: what the task alone tells."""
    class_mean_examples: ImageArray | None = field(default=None, repr=False, compare=False)
    """(n, S, S, 3), where pictures were asked for. Never in `to_json`."""

    @property
    def best(self) -> ReconstructionSummary | None:
        """The attack with the largest mean gain in SSIM; None if all crashed."""
        return max((a for a in self.attacks if a.completed), key=lambda summary: summary.gain, default=None)

    @property
    def claim_obstacle(self) -> str | None:
        """Why the input must not be called obfuscated; None where it may (SPEC E.4)."""
        if crashed := [summary.attack for summary in self.attacks if summary.crashed]:
            return f"crashed: {', '.join(crashed)}"
        if self.best is not None and self.best.gain > SSIM_MARGIN:
            return f"SSIM is {self.best.gain:.3f} above the mean image; a claim needs at most {SSIM_MARGIN}"
        if shown := self._recognised_obstacle():
            return shown
        if (seeds := min(len(summary.results) for summary in self.attacks)) < CLAIM_SEEDS:
            return f"{seeds} seed(s) per attack; a claim needs {CLAIM_SEEDS}"
        return None

    def _recognised_obstacle(self) -> str | None:
        """What the judge has against it (R3)."""
        if not self.targets:
            return "nobody looked at what the reconstructions show"
        for target in self.targets:
            if not target.capable:
                return (
                    f"the judge of {target.target!r} recognises real images at {target.real:.1%}: no better than chance"
                )
            highest = max(summary.recognised(target.target) for summary in self.attacks)
            if highest > target.baseline + CLAIM_MARGIN:
                limit = target.baseline + CLAIM_MARGIN
                return f"{target.target!r} is recognised at {highest:.1%}; a claim needs at most {limit:.1%}"
        return None

    @property
    def obfuscated(self) -> bool:
        """Whether "input obfuscated" may be said."""
        return self.claim_obstacle is None

    @property
    def sentence(self) -> str:
        """The claim, or the numbers that stand against it."""
        if self.best is None:
            return f"{self.feature}: nothing was measured, every attack crashed"
        measured = (
            f"best attack {self.best.attack}: SSIM {self.best.mean('ssim'):.3f}, PSNR {self.best.mean('psnr'):.1f} dB "
            f"(mean image {self.mean_image.ssim:.3f}, {self.mean_image.psnr:.1f} dB; {self._class_words}"
            f"nearest image {self.nearest_image.ssim:.3f}, {self.nearest_image.psnr:.1f} dB)"
        )
        if self.claim_obstacle is None:
            return f"{self.feature}: input obfuscated against these attackers; {measured}"
        return f"{self.feature}: {measured}; no claim of obfuscation: {self.claim_obstacle}"

    @property
    def _class_words(self) -> str:
        if self.class_mean is None:
            return ""
        words = f"mean image of the class {self.class_mean.ssim:.3f}, {self.class_mean.psnr:.1f} dB; "
        for summary in self.attacks:
            if (known := summary.from_answer) is not None and known.completed:
                words += f"{known.attack} of the answer alone {known.mean('ssim'):.3f}, {known.mean('psnr'):.1f} dB; "
        return words

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, derived numbers included."""
        return {
            "feature": self.feature,
            "mean_image": self.mean_image.to_json(),
            "class_mean": None if self.class_mean is None else self.class_mean.to_json(),
            "nearest_image": self.nearest_image.to_json(),
            "attacks": [summary.to_json() for summary in self.attacks],
            "targets": [
                {
                    "target": target.target,
                    "real": target.real,
                    "baseline": target.baseline,
                    "recognised": {s.attack: jsonable(s.recognised(target.target)) for s in self.attacks},
                }
                for target in self.targets
            ],
            "best": None if self.best is None else self.best.attack,
            "obfuscated": self.obfuscated,
            "claim_obstacle": self.claim_obstacle,
            "sentence": self.sentence,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionReport:
    """One row a feature."""

    rows: tuple[ReconstructionRow, ...]
    budget: ReconstructionBudget
    seed: int
    originals: ImageArray | None = field(default=None, repr=False, compare=False)
    """(n, S, S, 3), the images of the results' examples, where pictures were asked for. Never in `to_json`."""

    def row(self, feature: str) -> ReconstructionRow:
        """The row of that feature."""
        return next(row for row in self.rows if row.feature == feature)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; no picture is in it."""
        return {"seed": self.seed, "budget": self.budget.to_json(), "rows": [row.to_json() for row in self.rows]}
