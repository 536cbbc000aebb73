import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tasks.errors import UnknownNameError
from tasks.metrics import compute_metrics
from tasks.spec import TaskSpec


def spec(n, **changes):
    return TaskSpec(**{"name": "t", "target": "t", "classes": tuple(f"c{k}" for k in range(n))} | changes)


def draw(seed, n_classes, n=60):
    rng = np.random.default_rng(seed)
    targets = rng.integers(n_classes, size=n)
    targets[:n_classes] = np.arange(n_classes)
    return rng.normal(size=(n, n_classes)) + 2 * np.eye(n_classes)[targets] * rng.random((n, 1)), targets


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_known_numbers_of_a_small_unbalanced_case():
    logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]], dtype=np.float32)
    targets = np.array([0, 0, 0, 1])
    result = compute_metrics(spec(2), logits, targets)
    assert result == pytest.approx({"accuracy": 3 / 4, "balanced_accuracy": (2 / 3 + 1) / 2, "auc": 1.0})


def test_the_auc_of_two_classes_is_that_of_class_one():
    logits, targets = np.array([[0.0, 4.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]), np.array([0, 0, 1, 1])
    assert compute_metrics(spec(2), logits, targets)["auc"] == 0.5
    assert compute_metrics(spec(2), -logits, targets)["auc"] == 0.5
    assert compute_metrics(spec(2), logits, np.array([1, 0, 0, 0]))["auc"] == 1.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n_classes=st.integers(2, 6))
def test_they_are_scikit_learns(seed, n_classes):
    logits, targets = draw(seed, n_classes)
    p, answers = softmax(logits), logits.argmax(axis=1)
    expected_auc = (
        sk.roc_auc_score(targets, p[:, 1]) if n_classes == 2 else sk.roc_auc_score(targets, p, multi_class="ovr")
    )
    assert compute_metrics(spec(n_classes), logits, targets) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(targets, answers),
            "balanced_accuracy": sk.balanced_accuracy_score(targets, answers),
            "auc": expected_auc,
        }
    )


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n_classes=st.integers(2, 6))
def test_they_are_fractions_and_do_not_depend_on_the_order_of_examples(seed, n_classes):
    logits, targets = draw(seed, n_classes)
    order = np.random.default_rng(seed).permutation(len(targets))
    result = compute_metrics(spec(n_classes), logits, targets)
    assert all(0 <= value <= 1 for value in result.values())
    assert compute_metrics(spec(n_classes), logits[order], targets[order]) == pytest.approx(result)


def test_absent_classes_are_left_out_of_the_means_without_a_warning():
    logits, targets = draw(0, 5)
    kept = targets < 3
    result = compute_metrics(spec(5), logits[kept], targets[kept])
    recalls = [(logits[targets == c].argmax(axis=1) == c).mean() for c in range(3)]
    areas = [sk.roc_auc_score(targets[kept] == c, softmax(logits)[kept, c]) for c in range(3)]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert result["auc"] == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_with_one_class_present_the_auc_is_nan_without_a_warning(n_classes):
    result = compute_metrics(spec(n_classes), np.eye(n_classes)[[0, 0, 1]], np.array([0, 0, 0]))
    assert math.isnan(result["auc"])
    assert result["accuracy"] == result["balanced_accuracy"] == pytest.approx(2 / 3)


def test_confident_examples_are_still_ranked_where_float32_probabilities_tie():
    logits = np.array([[0, 50], [0, 60], [0, 70], [0, 80]], dtype=np.float32)
    assert compute_metrics(spec(2), logits, np.array([0, 0, 1, 1]))["auc"] == 1.0
    wide = np.concatenate([logits, np.full((4, 1), -90, np.float32)], axis=1)
    assert compute_metrics(spec(3), wide, np.array([0, 0, 1, 1]))["auc"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_makes_every_metric_nan(bad):
    logits, targets = draw(0, 3)
    logits[5, 1] = bad
    assert all(math.isnan(value) for value in compute_metrics(spec(3), logits, targets).values())


def test_maps_are_measured_as_numbers_of_0_to_1():
    dense = TaskSpec(name="t", target="t", shape=(1, 2, 2), levels=5, head="map", metrics=("psnr", "mean_error"))
    labels = np.array([0, 1, 2, 4]).reshape(1, 1, 2, 2).repeat(2, axis=0)
    answers = labels / 4
    answers[1] += 0.1
    exact = compute_metrics(dense, answers[:1], labels[:1])
    assert exact == pytest.approx({"psnr": 100.0, "mean_error": 0.0})
    assert compute_metrics(dense, answers[1:], labels[1:]) == pytest.approx({"psnr": 20.0, "mean_error": 0.1})
    assert compute_metrics(dense, answers, labels)["psnr"] == pytest.approx(60.0), "a mean of the images'"
    answers[0, 0, 0, 0] = np.nan
    assert all(map(math.isnan, compute_metrics(dense, answers, labels).values()))


def test_nothing_to_measure_is_nan():
    result = compute_metrics(spec(2), np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    assert list(result) == ["accuracy", "balanced_accuracy", "auc"]
    assert all(math.isnan(value) for value in result.values())


def test_only_the_tasks_metrics_are_computed_in_the_tasks_order():
    logits, targets = draw(0, 3)
    assert list(compute_metrics(spec(3, metrics=("auc", "accuracy")), logits, targets)) == ["auc", "accuracy"]


def test_an_unknown_metric_lists_the_known_ones():
    logits, targets = draw(0, 2)
    with pytest.raises(UnknownNameError, match=r"no metric named 'f1'; known: accuracy, auc, balanced_accuracy"):
        compute_metrics(spec(2, metrics=("f1",)), logits, targets)
