"""M1: was this image among those that a published task was trained on? (SPEC E.4)

The target is what a tenant holds, or can query: encoder, module and head as one classifier. Members are training rows
and non-members test rows of the same random split; where subsets are cut by person or driver, the two differ in more
than membership, and the numbers say so too. Axes: S shadow models, N candidates, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DataError
from orchestrator.evaluation.attacks.base import FloatArray, LabelArray, jsonable
from orchestrator.evaluation.floors import clopper_pearson
from orchestrator.sampling import derive_seed

BoolArray = NDArray[np.bool_]
ScoreArray = NDArray[np.float64]

FALSE_POSITIVE_RATE = 0.01
"""At which the true positive rate is read (Carlini et al. 2022): an attack that is right about few, but surely."""
_BOOTSTRAPS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipInput:
    """What the target, and the attacker's own models of the same kind, answer for every candidate."""

    logits: FloatArray = field(repr=False)
    """(N, K), the target's."""
    labels: LabelArray = field(repr=False)
    member: BoolArray = field(repr=False)
    """(N,), the truth: for scoring, and never seen by an attack."""
    shadow_logits: FloatArray | None = field(default=None, repr=False)
    """(S, N, K); None for attacks without shadow models."""
    shadow_member: BoolArray | None = field(default=None, repr=False)
    """(S, N): which candidates each shadow model was trained on."""
    seed: int

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.logits.shape[:1] != (n,) or self.member.shape != (n,):
            raise DataError(f"{len(self.logits)} answers and {len(self.member)} memberships of {n} candidates")
        if not 0 < int(self.member.sum()) < n:
            raise DataError(f"of {n} candidates {int(self.member.sum())} are members: it takes some of either kind")
        if not np.isfinite(self.logits).all():
            raise DataError("the target's answers hold NaN or infinity")


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipResult:
    """How well one attack tells members from non-members; or that it crashed, which says nothing about privacy."""

    attack: str
    seed: int
    members: int = 0
    others: int = 0
    auc: float = math.nan
    """0.5 is chance."""
    auc_low: float = math.nan
    auc_high: float = math.nan
    """95 %, by bootstrap over members and over non-members."""
    tpr: float = math.nan
    """Share of members found at a false positive rate of at most 1 %; 1 % is chance."""
    tpr_low: float = math.nan
    tpr_high: float = math.nan
    """95 %: the wider, on either side, of Clopper-Pearson over the members and of the bootstrap with a threshold of its
    own each time. With few non-members the threshold is the less certain part."""
    false_positives: int = 0
    """Non-members above that threshold."""
    seconds: float = 0.0
    crashed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; NaN becomes null."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


class MembershipAttack(Protocol):
    """One way of guessing: a frozen dataclass."""

    @property
    def name(self) -> str:
        """What tables and reports call it."""
        ...

    def run(self, data: MembershipInput) -> ScoreArray:
        """(N,), higher for candidates that are rather members. May raise. Does not look at ``data.member``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LossThreshold:
    """Members have a small loss (Yeom et al. 2018)."""

    name: str = "loss"

    def run(self, data: MembershipInput) -> ScoreArray:
        """Minus the cross-entropy."""
        return log_probabilities(data.logits)[np.arange(len(data.labels)), data.labels]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionEntropy:
    """Members are answered confidently, rightly or not (Salem et al. 2019): takes no label."""

    name: str = "entropy"

    def run(self, data: MembershipInput) -> ScoreArray:
        """Minus the entropy of the answer."""
        log_p = log_probabilities(data.logits)
        score: ScoreArray = (np.exp(log_p) * log_p).sum(axis=1)
        return score


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodRatio:
    """LiRA with few shadow models (Carlini et al. 2022): is the answer more like that of models that saw the image?

    Per candidate two Gaussians of the logit-scaled confidence, one over the shadow models that were trained on it and
    one over the others. Variances are shared by all candidates, as the authors do with few models.
    """

    name: str = "lira_lite"

    def run(self, data: MembershipInput) -> ScoreArray:
        """The log-likelihood ratio."""
        if data.shadow_logits is None or data.shadow_member is None:
            raise DataError(f"{self.name} needs shadow models")
        inside = data.shadow_member
        if min(inside.sum(axis=0).min(), (~inside).sum(axis=0).min()) < 1:
            raise DataError("every candidate must be in some shadow models' training set and not in some others'")
        shadows = np.stack([confidence(logits, data.labels) for logits in data.shadow_logits])
        mean_in, var_in = _gaussian(shadows, inside)
        mean_out, var_out = _gaussian(shadows, ~inside)
        target = confidence(data.logits, data.labels)
        score: ScoreArray = _log_density(target, mean_in, var_in) - _log_density(target, mean_out, var_out)
        return score


MEMBERSHIP_ATTACKS: tuple[MembershipAttack, ...] = (LossThreshold(), PredictionEntropy(), LikelihoodRatio())


def attack_membership(
    data: MembershipInput, attacks: Sequence[MembershipAttack] = MEMBERSHIP_ATTACKS
) -> tuple[MembershipResult, ...]:
    """Every attack on one target. Without shadow models, `LikelihoodRatio` is left out."""
    possible = [a for a in attacks if data.shadow_logits is not None or not isinstance(a, LikelihoodRatio)]
    return tuple(_attack_once(attack, data) for attack in possible)


def _attack_once(attack: MembershipAttack, data: MembershipInput) -> MembershipResult:
    started = time.perf_counter()
    try:
        scores = attack.run(data)
        return score_membership(
            scores, data.member, attack=attack.name, seed=data.seed, seconds=time.perf_counter() - started
        )
    except Exception as error:
        seconds = time.perf_counter() - started
        return MembershipResult(
            attack=attack.name, seed=data.seed, seconds=seconds, crashed=f"{type(error).__name__}: {error}"
        )


def score_membership(
    scores: ScoreArray, member: BoolArray, *, attack: str, seed: int, seconds: float = 0.0
) -> MembershipResult:
    """AUC and TPR at 1 % FPR, with intervals. Raises `FloatingPointError` for scores that are not finite."""
    if not np.isfinite(scores).all():
        raise FloatingPointError("the attack's scores hold NaN or infinity")
    inside, outside = scores[member], scores[~member]
    aucs, tprs = _bootstrap(inside, outside, seed)
    threshold = false_positive_threshold(outside)
    found = int((inside > threshold).sum())
    exact_low, exact_high = clopper_pearson(found, len(inside))
    return MembershipResult(
        attack=attack,
        seed=seed,
        members=len(inside),
        others=len(outside),
        auc=auc(inside, outside),
        auc_low=aucs[0],
        auc_high=aucs[1],
        tpr=found / len(inside),
        tpr_low=min(exact_low, tprs[0]),
        tpr_high=max(exact_high, tprs[1]),
        false_positives=int((outside > threshold).sum()),
        seconds=seconds,
    )


def auc(inside: ScoreArray, outside: ScoreArray) -> float:
    """How often a member scores above a non-member; ties count half."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left") + np.searchsorted(ordered, inside, side="right")
    return float(below.mean() / (2 * len(ordered)))


def false_positive_threshold(outside: ScoreArray, rate: float = FALSE_POSITIVE_RATE) -> float:
    """The lowest score that at most ``rate`` of the non-members lie above; with under 100 of them, their highest."""
    allowed = math.floor(rate * len(outside))
    return float(np.sort(outside)[::-1][allowed])


def _bootstrap(inside: ScoreArray, outside: ScoreArray, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % intervals of the AUC and of the TPR, over members and non-members."""
    rng = np.random.default_rng(derive_seed(seed, "membership bootstrap"))
    aucs, tprs = [], []
    for _ in range(_BOOTSTRAPS):
        drawn, others = rng.choice(inside, len(inside)), rng.choice(outside, len(outside))
        aucs.append(auc(drawn, others))
        tprs.append(float((drawn > false_positive_threshold(others)).mean()))
    return _middle(aucs), _middle(tprs)


def _middle(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def log_probabilities(logits: FloatArray) -> ScoreArray:
    """(N, K), in double precision: what a memorising model is sure of must not round to certainty."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    result: ScoreArray = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return result


def confidence(logits: FloatArray, labels: LabelArray) -> ScoreArray:
    """log(p / (1 - p)) of the right class, from the logits, so that no 1 - p is lost to rounding."""
    values, rows = logits.astype(np.float64), np.arange(len(labels))
    right = values[rows, labels].copy()
    values[rows, labels] = -np.inf
    highest = values.max(axis=1)
    result: ScoreArray = right - highest - np.log(np.exp(values - highest[:, None]).sum(axis=1))
    return result


def _gaussian(values_SN: ScoreArray, chosen_SN: BoolArray) -> tuple[ScoreArray, float]:
    """The mean of the chosen ones per candidate, and their variance about it over all candidates."""
    counts = chosen_SN.sum(axis=0)
    mean: ScoreArray = np.where(chosen_SN, values_SN, 0).sum(axis=0) / counts
    squares = np.where(chosen_SN, (values_SN - mean) ** 2, 0).sum()
    return mean, float(squares / max(1, counts.sum() - len(counts))) + 1e-9


def _log_density(x: ScoreArray, mean: ScoreArray, variance: float) -> ScoreArray:
    result: ScoreArray = -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))
    return result
