"""What needs no feature to be known: a guess, and what one task's label gives away about another's (SPEC E.2)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from orchestrator.evaluation.attacks.base import LabelArray


class Floor(NamedTuple):
    """How well y_j is predicted from y_i alone, with the rule that is best for each measure."""

    accuracy: float
    balanced_accuracy: float


def chance_rate(known_y: LabelArray, test_y: LabelArray) -> float:
    """Test accuracy of a guess: always the commonest known class, or one drawn among the known ones.

    Where classes are about equally frequent, the one that is the commonest among few known rows can be rare among the
    test rows: then the draw does better, and what an attacker has up to there is none of the feature's doing.
    """
    counts = np.bincount(known_y)
    known = np.flatnonzero(counts)
    always, drawn = (test_y == counts.argmax()).mean(), np.isin(test_y, known).mean() / len(known)
    return float(max(always, drawn))


def label_floor(known: tuple[LabelArray, LabelArray], test: tuple[LabelArray, LabelArray]) -> Floor:
    """Of rows ``(y_i, y_j)``: a table from y_i to y_j is fitted on the known ones and measured on the test ones.

    A feature that serves task i may determine y_i, so whoever holds it can do this well without any leak.
    """
    given, target = known
    shape = (1 + max(int(given.max()), int(test[0].max())), 1 + int(target.max()))
    counts = np.zeros(shape)
    np.add.at(counts, (given, target), 1)
    prior = counts.sum(axis=0)
    # A y_i that was never seen says nothing: its row is the prior, as if it had been seen a vanishing number of times.
    counts += 1e-9 * prior
    likelihood = counts / np.maximum(prior, 1)
    answers, balanced_answers = counts.argmax(axis=1)[test[0]], likelihood.argmax(axis=1)[test[0]]
    recalls = [float((balanced_answers[test[1] == k] == k).mean()) for k in np.unique(test[1])]
    return Floor(float((answers == test[1]).mean()), float(np.mean(recalls)))


def clopper_pearson(correct: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a proportion."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if correct == 0 else float(beta.ppf(tail, correct, total - correct + 1))
    high = 1.0 if correct == total else float(beta.ppf(1 - tail, correct + 1, total - correct))
    return low, high
