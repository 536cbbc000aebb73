"""How much privacy an attack shows to be lost: a lower bound on epsilon, with its confidence.

Whoever decides from a release whether an example was in the training, with true and false positive rates TPR and FPR,
has under (epsilon, delta)-DP

    TPR <= exp(epsilon) * FPR + delta        and        1 - FPR <= exp(epsilon) * (1 - TPR) + delta,

so intervals for the two rates give an epsilon that the mechanism cannot be below (Jagielski et al. 2020, arXiv
2006.07709; Nasr et al. 2021, arXiv 2101.04535).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError
from orchestrator.evaluation.floors import clopper_pearson

Scores = NDArray[np.float64]
"""One number a run; larger where the attacker is surer that the example was in."""
_CAUTION: Final = 50
"""By how much rarer a miss. Without it one in twenty bounds on Gaussian scores is a quarter smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What an attack showed on runs that did not choose its threshold."""

    epsilon: float
    """Not below this, with the confidence; 0.0 where nothing was shown."""
    true_positives: int
    """Of the runs with the example."""
    false_positives: int
    """Of as many runs without."""
    runs: int
    """With the example; as many without."""

    @property
    def tpr(self) -> float:
        """As measured."""
        return self.true_positives / self.runs

    @property
    def fpr(self) -> float:
        """As measured."""
        return self.false_positives / self.runs


def epsilon_lower_bound(with_example: Scores, without: Scores, *, delta: float, confidence: float) -> Bound:
    """From as many runs with the example as without.

    The first half of the runs chooses the threshold and the second measures it: a threshold that has seen the runs
    that it is measured on shows more than there is.
    """
    if len(with_example) != len(without) or len(without) < 2:
        raise ConfigError(
            f"as many runs with the example as without, and two at least: {len(with_example), len(without)}"
        )
    if np.isnan(with_example).any() or np.isnan(without).any():
        raise ConfigError("a score is not a number")
    half = len(without) // 2
    # Chosen with more caution than measured: of many thresholds, one far out looks good by chance.
    table = _Rates(half, confidence=1 - (1 - confidence) / _CAUTION)
    pooled = np.unique(np.concatenate([with_example[:half], without[:half]]))
    thresholds = (pooled[:-1] + pooled[1:]) / 2 if len(pooled) > 1 else pooled
    shown = [
        table.epsilon(int((with_example[:half] > t).sum()), int((without[:half] > t).sum()), delta=delta)
        for t in thresholds
    ]
    threshold = thresholds[int(np.argmax(shown))]
    rest = len(without) - half
    true_positives, false_positives = (
        int((with_example[half:] > threshold).sum()),
        int((without[half:] > threshold).sum()),
    )
    measured = _Rates(rest, confidence=confidence).epsilon(true_positives, false_positives, delta=delta)
    return Bound(epsilon=max(0.0, measured), true_positives=true_positives, false_positives=false_positives, runs=rest)


def largest_bound(runs: int, *, delta: float, confidence: float) -> float:
    """What an attack that is never wrong would show with so many runs with the example, and as many without."""
    rest = runs - runs // 2
    return max(0.0, _Rates(rest, confidence=confidence).epsilon(rest, 0, delta=delta))


class _Rates:
    """Two rates out of ``runs`` each. With ``confidence`` both are within their Clopper-Pearson intervals."""

    def __init__(self, runs: int, *, confidence: float) -> None:
        self._intervals = _intervals(runs, confidence)

    def epsilon(self, true_positives: int, false_positives: int, *, delta: float) -> float:
        """Minus infinity where the intervals allow any epsilon."""
        tpr, fpr = self._intervals[true_positives][0], self._intervals[false_positives][1]
        return max(_ratio(tpr - delta, fpr), _ratio(1 - fpr - delta, 1 - tpr))


@lru_cache(maxsize=16)
def _intervals(runs: int, confidence: float) -> tuple[tuple[float, float], ...]:
    """Of every count. Each is used at one end only: one of two rates is missed with at most twice the tail."""
    return tuple(clopper_pearson(count, runs, confidence=confidence) for count in range(runs + 1))


def _ratio(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator) if numerator > 0 else -math.inf
