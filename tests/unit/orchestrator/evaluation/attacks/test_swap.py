import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.evaluation.attacks.swap import accuracy, best_renaming, confusion, head_logits, permuted_accuracy


def test_a_head_that_is_always_inverted_scores_what_it_got_wrong():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    predictions = np.where(rng.random(1000) < 0.8, 1 - labels, labels)
    plain = accuracy(predictions, labels)
    assert plain < 0.25
    assert permuted_accuracy(predictions, labels, n_predicted=2, n_true=2, seed=0) == 1 - plain


@given(st.permutations(range(5)))
def test_a_permuted_answer_is_put_right_whatever_the_permutation(permutation):
    labels = np.arange(200) % 5
    predictions = np.array(permutation)[labels]
    assert permuted_accuracy(predictions, labels, n_predicted=5, n_true=5, seed=0) == 1.0


def test_a_renaming_of_noise_gains_nothing_because_it_is_measured_on_the_other_half():
    rng = np.random.default_rng(0)
    scores = []
    for seed in range(20):
        predictions, labels = rng.integers(0, 20, 200), rng.integers(0, 20, 200)
        scores.append(permuted_accuracy(predictions, labels, n_predicted=20, n_true=20, seed=seed))
    assert abs(np.mean(scores) - 0.05) < 0.015


def test_a_constant_answer_scores_the_majority():
    labels = np.array([0] * 30 + [1] * 70)
    predictions = np.zeros(100, dtype=np.int64)
    assert permuted_accuracy(predictions, labels, n_predicted=2, n_true=2, seed=0) == 0.7


def test_the_renaming_is_the_assignment_with_the_most_hits():
    # Row by row both predicted classes would take true class 0; one-to-one, (0 -> 1, 1 -> 0) hits 5 + 9.
    assert best_renaming(np.array([[6, 5], [9, 1]])).tolist() == [1, 0]


def test_predicted_classes_left_over_take_their_commonest_true_class():
    assert best_renaming(np.array([[9, 0], [0, 9], [1, 3]])).tolist() == [0, 1, 1]


def test_the_confusion_matrix_counts_predicted_by_true():
    counts = confusion(np.array([0, 0, 2]), np.array([1, 1, 0]), 3, 2)
    assert counts.tolist() == [[0, 2], [0, 0], [1, 0]]


def test_a_head_answers_in_evaluation_mode_and_is_left_as_it_was():
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    z = np.random.default_rng(0).normal(size=(300, 1, 2, 2)).astype(np.float32)
    logits = head_logits(head, z)
    expected = head[2](torch.from_numpy(z).flatten(1)).detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert head.training
