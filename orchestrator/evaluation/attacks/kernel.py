"""A6, kernel machines and nearest neighbours (SPEC E.4): what lies in distances rather than in directions.

Both look at the first principal components, since distances in thousands of coordinates say little; so they miss what
hides in directions of little variance, which A1 to A3 look for. Axes: N rows, D components, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ConfigError
from orchestrator.evaluation.attacks.base import (
    AttackInput,
    AttackResult,
    FloatArray,
    LabelArray,
    cross_entropy_bits,
    score,
)
from orchestrator.sampling import derive_seed

Matrix = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class SvmAttack:
    """A support vector machine with a Gaussian kernel; its settings are chosen on the validation rows."""

    name: str = "svm"
    components: int = 64
    costs: tuple[float, ...] = (1.0, 10.0)
    """C of the machine."""
    scales: tuple[float, ...] = (0.3, 1.0, 3.0)
    """gamma, in units of 1 / (D times the variance)."""
    max_rows: int = 4000
    """Of those that it learns from, drawn at random: time grows with their square."""

    def __post_init__(self) -> None:
        _check_counts(self.name, components=self.components, max_rows=self.max_rows)

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        from sklearn.svm import SVC

        seed = derive_seed(data.seed, "svm") % 2**32
        d = min(self.components, data.train_z[0].size)
        models = [
            _Model(whitened, partial(SVC, C=cost, gamma=scale / d, random_state=seed))
            for whitened in (False, True)
            for cost in self.costs
            for scale in self.scales
        ]
        return _attack(self.name, data, models, components=self.components, max_rows=self.max_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestAttack:
    """The vote of the nearest rows, each weighing in with the inverse of its distance."""

    name: str = "knn"
    components: int = 64
    neighbours: int = 15
    max_rows: int = 50_000
    """Of those that it remembers, drawn at random."""

    def __post_init__(self) -> None:
        _check_counts(self.name, components=self.components, neighbours=self.neighbours, max_rows=self.max_rows)

    def run(self, data: AttackInput) -> AttackResult:
        """Remember the training rows, choose on the validation rows, answer for the test rows."""
        from sklearn.neighbors import KNeighborsClassifier

        k = min(self.neighbours, len(data.train_y))
        models = [_Model(whitened, partial(KNeighborsClassifier, k, weights="distance")) for whitened in (False, True)]
        return _attack(self.name, data, models, components=self.components, max_rows=self.max_rows)


class _Classifier(Protocol):
    """What is used of a scikit-learn classifier."""

    classes_: LabelArray

    def fit(self, x: Matrix, y: LabelArray) -> object: ...


class _Model(NamedTuple):
    whitened: bool
    """Every component scaled to the same variance."""
    build: Callable[[], _Classifier]


def _attack(name: str, data: AttackInput, models: Iterable[_Model], *, components: int, max_rows: int) -> AttackResult:
    """The model with the best validation accuracy, fitted again on the training and validation rows together."""
    started = time.perf_counter()
    rng = np.random.default_rng(derive_seed(data.seed, name))
    kept = np.sort(rng.permutation(len(data.train_y))[:max_rows])
    train_y, n_train = data.train_y[kept], len(kept)
    known_y = np.concatenate([train_y, data.validation_y])
    rows = np.concatenate([z.reshape(len(z), -1) for z in (data.train_z[kept], data.validation_z, data.test_z)])
    x_ND = _principal(rows, len(known_y), components, seed=derive_seed(data.seed, name, "pca"))
    best: tuple[tuple[float, float], _Model, FloatArray] | None = None
    for model in models:
        x = _scaled(x_ND, len(known_y), whitened=model.whitened)
        logits = _logits(model, x[:n_train], train_y, x[n_train : len(known_y)], data.n_classes)
        accuracy = float((logits.argmax(axis=1) == data.validation_y).mean())
        rank = accuracy, -cross_entropy_bits(logits, data.validation_y)
        if best is None or rank > best[0]:
            best = rank, model, logits
    assert best is not None
    _, model, validation_logits = best
    x = _scaled(x_ND, len(known_y), whitened=model.whitened)
    test_logits = _logits(model, x[: len(known_y)], known_y, x[len(known_y) :], data.n_classes)
    seconds = time.perf_counter() - started
    return score(name, data, validation_logits=validation_logits, test_logits=test_logits, seconds=seconds)


def _principal(rows_ND: FloatArray, n_known: int, components: int, *, seed: int) -> Matrix:
    """All rows in the leading principal components of the standardised known ones; fewer where there are fewer."""
    from sklearn.decomposition import PCA

    std, mean = (f(rows_ND[:n_known], axis=0, dtype=np.float64).astype(np.float32) for f in (np.std, np.mean))
    x_ND = (rows_ND - mean) / np.where(std > 0, std, np.float32(1))
    d = min(components, n_known, x_ND.shape[1])
    if not std.any():
        return x_ND[:, :d]
    return np.asarray(PCA(d, random_state=seed % 2**32).fit(x_ND[:n_known]).transform(x_ND))


def _scaled(x_ND: Matrix, n_known: int, *, whitened: bool) -> Matrix:
    """To a variance of one, on average over the components or of each of them."""
    variance = x_ND[:n_known].var(axis=0)
    scale = np.sqrt(variance if whitened else np.full_like(variance, variance.mean()))
    return np.asarray(x_ND / np.where(scale > 1e-9, scale, 1.0))


def _logits(model: _Model, x: Matrix, y: LabelArray, asked: Matrix, n_classes: int) -> FloatArray:
    """(N, K). A class that is not among the labels gets the lowest answer of its row, less one."""
    if len(np.unique(y)) == 1:
        return np.tile(np.eye(n_classes, dtype=np.float32)[y[0]], (len(asked), 1))
    classifier = model.build()
    classifier.fit(x, y)
    found = _confidence(classifier, asked)
    logits = np.repeat(found.min(axis=1, keepdims=True) - 1, n_classes, axis=1)
    logits[:, classifier.classes_] = found
    return logits.astype(np.float32)


def _confidence(classifier: _Classifier, asked: Matrix) -> Matrix:
    """(N, classes seen): decision values, or log probabilities kept from minus infinity."""
    from sklearn.svm import SVC

    if isinstance(classifier, SVC):
        margins: Matrix = classifier.decision_function(asked)
        return margins if margins.ndim == 2 else np.stack([-margins / 2, margins / 2], axis=1)
    assert hasattr(classifier, "predict_proba")
    return np.asarray(np.log(classifier.predict_proba(asked) + 0.01))


def _check_counts(attack: str, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{attack} attack: {name} must be at least 1, got {count}")
