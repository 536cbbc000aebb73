"""A0, the paper's test: one task's feature in another task's head (SPEC E.1, E.2).

It trains nothing, so it says little: any mismatch between z_i and what M_j was trained on gives garbage, with no
defence at all. It is reported because the paper reports it. Axes: N examples, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.evaluation.attacks.base import FloatArray, LabelArray


def head_logits(head: nn.Module, z: FloatArray) -> FloatArray:
    """(N, K) logits of a head in evaluation mode, on its own device; its mode is put back afterwards."""
    device = next((p.device for p in head.parameters()), torch.device("cpu"))
    was_training = head.training
    head.eval()
    try:
        with torch.no_grad():
            parts = [head(part.to(device)).float().cpu() for part in torch.from_numpy(z).split(256)]
    finally:
        head.train(was_training)
    return np.asarray(torch.cat(parts).numpy())


def accuracy(predictions: LabelArray, labels: LabelArray) -> float:
    """Share of rows on which they agree."""
    return float((predictions == labels).mean())


def permuted_accuracy(
    predictions: LabelArray, labels: LabelArray, *, n_predicted: int, n_true: int, seed: int
) -> float:
    """Accuracy after renaming the answers as suits the attacker best: a head that is always wrong knows the answer.

    The renaming is fitted on one random half of the rows and measured on the other, and the other way round, so every
    row counts once and none is measured under a renaming that it helped to choose.
    """
    if len(labels) < 2:
        return accuracy(predictions, labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    correct = 0
    for fitted, measured in (halves, halves[::-1]):
        renaming = best_renaming(confusion(predictions[fitted], labels[fitted], n_predicted, n_true))
        correct += int((renaming[predictions[measured]] == labels[measured]).sum())
    return correct / len(labels)


def confusion(predictions: LabelArray, labels: LabelArray, n_predicted: int, n_true: int) -> NDArray[np.int64]:
    """(n_predicted, n_true) counts."""
    counts = np.zeros((n_predicted, n_true), dtype=np.int64)
    np.add.at(counts, (predictions, labels), 1)
    return counts


def best_renaming(counts: NDArray[np.int64]) -> LabelArray:
    """Predicted class to true class: the one-to-one assignment with the most hits (Hungarian method).

    Predicted classes that are left over, where there are more of them than true ones, get their commonest true class.
    """
    from scipy.optimize import linear_sum_assignment

    renaming: LabelArray = counts.argmax(axis=1).astype(np.int64)
    predicted, true = linear_sum_assignment(counts, maximize=True)
    renaming[predicted] = true
    return renaming
