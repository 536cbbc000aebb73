"""What the bits of bounded features allow an attacker of one label: for any images, and for images like the test rows.

Axes: N rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.evaluation.attacks.base import FloatArray, LabelArray
from orchestrator.evaluation.floors import clopper_pearson
from orchestrator.evaluation.report import Bound
from orchestrator.privacy.bounded.bounds import accuracy_bound, accuracy_bound_given_task, bits_needed
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.rate import MixturePrior, RateBound, rate_bound

_DECIMALS = 9
"""To which two bounds are the same, so that the plainer one is named."""


def measured_rate(
    channel: ChannelConfig, vectors: Mapping[str, FloatArray], labels: Mapping[str, LabelArray]
) -> RateBound:
    """Of the test rows, from s (N, D) or (N, D, H, W) and the labels of the feature's own task, by subset.

    The density is fitted on all other subsets: most of them are as new to the feature as the test rows. For a map it is
    one for each cell, and of one class where the labels are no classes.
    """
    others = [subset for subset in vectors if subset != "test"]
    s, y = (np.concatenate([by_subset[subset] for subset in others]) for by_subset in (vectors, labels))
    y = y if y.ndim == 1 else np.zeros(len(y), dtype=np.int64)
    cells = s.reshape(*s.shape[:2], -1)
    priors = [MixturePrior.fit(cells[..., cell], y, tau=channel.noise) for cell in range(cells.shape[-1])]
    return rate_bound(vectors["test"], channel.noise, priors)


def capacity_row_bound(channels: Sequence[ChannelConfig | None], test_y: LabelArray) -> Bound | None:
    """By the capacity of the channels together, whose bits add up; None where a feature is not bounded."""
    bounded = [channel.bits_per_image for channel in channels if channel is not None]
    if len(bounded) < len(channels):
        return None
    bits = math.fsum(bounded)
    found = accuracy_bound(bits, label_shares(test_y))
    return Bound(bits=bits, accuracy=found.accuracy, method=found.method, assumption=found.assumption)


def rate_row_bound(
    channels: Sequence[ChannelConfig | None],
    rates: Sequence[RateBound | None],
    own_y: LabelArray,
    test_y: LabelArray,
    *,
    own: float | None,
) -> Bound | None:
    """By the measured rates, for images like the test rows; None where one was not measured.

    ``own_y`` (N,) is the label of the feature's own task and ``own`` the accuracy of its head on the same rows: what
    these prove to be spent on the task, no secret can have (`accuracy_bound_given_task`). None does without, as for
    several features together. Each upper end of a two-sided 95 % interval fails with 2.5 %, so a bound holds with 95 %
    that rests on two of them.
    """
    found = [
        min(channel.bits_per_image, rate.high)
        for channel, rate in zip(channels, rates, strict=True)
        if channel is not None and rate is not None
    ]
    if not found or len(found) < len(channels):
        return None
    bits = math.fsum(found)
    like = next(rate.assumption for rate in rates if rate is not None)
    plain = accuracy_bound(bits, label_shares(test_y))
    bound = Bound(bits=bits, accuracy=plain.accuracy, method=plain.method, assumption=f"{like}; {plain.assumption}")
    if own is None:
        return bound
    given = accuracy_bound_given_task(bits, least_task_bits(own, own_y), best_guess(own_y, test_y))
    if round(given.accuracy, _DECIMALS) >= round(bound.accuracy, _DECIMALS):
        return bound
    return Bound(bits=bits, accuracy=given.accuracy, method="given_task", assumption=f"{like}; {given.assumption}")


def least_task_bits(own: float, own_y: LabelArray) -> float:
    """I(z; y) at least, on rows like these: what the lower end of the 95 % interval of the head's accuracy takes."""
    low, _ = clopper_pearson(round(own * len(own_y)), len(own_y))
    return bits_needed(low, label_shares(own_y))


def best_guess(given_y: LabelArray, y: LabelArray) -> float:
    """Accuracy of the best rule from one label to the other on these very rows: no rule does better on them."""
    counts = np.zeros((int(given_y.max()) + 1, int(y.max()) + 1))
    np.add.at(counts, (given_y, y), 1)
    return float(counts.max(axis=1).sum() / len(y))


def label_shares(y: LabelArray) -> list[float]:
    """How frequent each label that occurs is."""
    counts = np.unique(y, return_counts=True)[1]
    return list((counts / counts.sum()).tolist())
