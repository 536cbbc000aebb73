"""How well a head does. Of classes: fractions in [0, 1], higher is better. Of maps: PSNR in dB, and the mean error.

NumPy alone, for small devices. A metric that is not defined is NaN, without a warning: nothing to measure, a logit that
is NaN or infinite, an AUC where only one class is present. Axes: B examples, n classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.registry import look_up
from tasks.spec import TaskSpec

Logits = NDArray[np.float64]
Targets = NDArray[np.int64]
Maps = NDArray[np.floating[Any]]
_PERFECT = 1e-10
"""Least mean squared error: 100 dB, far finer than a map of 256 levels."""


def accuracy(logits_Bn: Logits, targets_B: Targets) -> float:
    """Share of examples whose largest logit is that of their class."""
    return float(np.mean(logits_Bn.argmax(axis=1) == targets_B))


def balanced_accuracy(logits_Bn: Logits, targets_B: Targets) -> float:
    """Mean recall over the classes that are present: guessing scores 1 / n, whatever the class sizes."""
    right_B = logits_Bn.argmax(axis=1) == targets_B
    return float(np.mean([right_B[targets_B == c].mean() for c in np.unique(targets_B)]))


def auc(logits_Bn: Logits, targets_B: Targets) -> float:
    """Area under the ROC curve: of class 1 for two classes, else the mean of one-vs-rest over the classes present."""
    present = np.unique(targets_B)
    if len(present) < 2:
        return float("nan")
    classes = [1] if logits_Bn.shape[1] == 2 else list(present)
    return float(np.mean([_ranked_above(_log_odds(logits_Bn, c), targets_B == c) for c in classes]))


def _ranked_above(scores_B: NDArray[np.float64], inside_B: NDArray[np.bool_]) -> float:
    """How often an example inside has a higher score than one outside, ties counting half (Mann and Whitney 1947)."""
    _, place_B, ties = np.unique(scores_B, return_inverse=True, return_counts=True)
    rank_B = (np.cumsum(ties) - (ties - 1) / 2)[place_B]
    n = int(inside_B.sum())
    return float((rank_B[inside_B].sum() - n * (n + 1) / 2) / (n * (len(scores_B) - n)))


def _log_odds(logits_Bn: Logits, c: int) -> NDArray[np.float64]:
    """Ranks like the probability of class ``c``, but two confident examples do not tie because both round to 1."""
    scores: NDArray[np.float64] = logits_Bn[:, c] - np.logaddexp.reduce(np.delete(logits_Bn, c, axis=1), axis=1)
    return scores


def psnr(maps_BCHW: Maps, targets_BCHW: Maps) -> float:
    """Mean over the examples of the peak signal-to-noise ratio in dB, for values of 0 to 1; higher is better."""
    errors_B = np.square(maps_BCHW - targets_BCHW).reshape(len(maps_BCHW), -1).mean(axis=1)
    return float(-10 * np.log10(np.maximum(errors_B, _PERFECT)).mean())


def mean_error(maps_BCHW: Maps, targets_BCHW: Maps) -> float:
    """Mean absolute error, for values of 0 to 1; lower is better."""
    return float(np.abs(maps_BCHW - targets_BCHW).mean())


METRICS: Mapping[str, Callable[[NDArray[np.float64], Any], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "auc": auc,
    "psnr": psnr,
    "mean_error": mean_error,
}


def compute_metrics(spec: TaskSpec, logits: NDArray[np.floating], targets: Targets) -> dict[str, float]:
    """The task's metrics, in the order of ``spec.metrics``, of outputs and labels.

    ``logits`` are (B, n_outputs), or maps (B, C, H, W); ``targets`` are labels (B, *spec.label_shape). Raises
    `UnknownNameError` for a metric that is none of `METRICS`.
    """
    expected = (len(targets), *(spec.label_shape or (spec.n_outputs,)))
    assert logits.shape == expected, (logits.shape, expected)
    metrics = {name: look_up(METRICS, "metric", name) for name in spec.metrics}
    if len(targets) == 0 or not np.isfinite(logits).all():
        return dict.fromkeys(metrics, float("nan"))
    exact, wanted = logits.astype(np.float64), spec.targets(targets)
    return {name: metric(exact, wanted) for name, metric in metrics.items()}
