"""What is known of bounded features beside what attackers find: their capacity, and the rate that was measured.

Axes: N rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.evaluation.attacks.base import FloatArray, LabelArray
from orchestrator.evaluation.collect import Published
from orchestrator.evaluation.leakage import label_shares, own_accuracy
from orchestrator.privacy.bounded.bounds import bits_needed, capacity_bound, local_dp_epsilon
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.rate import MixturePrior, RateBound, rate_bound
from orchestrator.privacy.guarantee import LOCAL_DELTA
from orchestrator.report.sheet import NOT_MEASURED, Sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundedFeature:
    """One task's."""

    task: str
    channel: ChannelConfig
    rate: RateBound
    """Of the test rows, by a density that was fitted on training rows."""
    task_bits: float | None
    """That the accuracy of the task's own head proves to be in the feature; None where there is no head."""

    @property
    def bits(self) -> float:
        """The smaller of capacity and the upper end of the rate."""
        return min(self.channel.bits_per_image, self.rate.high)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, derived numbers and assumptions included."""
        capacity = capacity_bound(self.channel)
        return {
            "task": self.task,
            "channel": self.channel.to_json(),
            "bits": capacity.bits,
            "bits_assumption": capacity.assumption,
            "rate": asdict(self.rate),
            "task_bits": self.task_bits,
            "local_dp_epsilon": local_dp_epsilon(self.channel, LOCAL_DELTA),
            "local_dp_delta": LOCAL_DELTA,
        }


def measure_bounded(published: Published) -> tuple[BoundedFeature, ...]:
    """Of every bounded task that is sold."""
    found = []
    for task, given in published.features.items():
        if given.channel is not None and not given.private:
            own = own_accuracy(given, published.labels)
            vectors, labels = published.vectors[task], published.labels[task]
            found.append(bounded_feature(task, given.channel, vectors, labels, own=own))
    return tuple(found)


def bounded_feature(
    task: str,
    channel: ChannelConfig,
    vectors: Mapping[str, FloatArray],
    labels: Mapping[str, LabelArray],
    *,
    own: float | None,
) -> BoundedFeature:
    """From s (N, D) and the task's own labels, by subset; ``own`` is the accuracy of its head on the test rows."""
    prior = MixturePrior.fit(vectors["train"], labels["train"], tau=channel.noise)
    return BoundedFeature(
        task=task,
        channel=channel,
        rate=rate_bound(vectors["test"], channel.noise, prior),
        task_bits=None if own is None else bits_needed(own, label_shares(labels["test"])),
    )


def bounded_sheet(features: Sequence[BoundedFeature]) -> Sheet:
    """One row a feature."""
    return Sheet(
        title="What bounded features carry",
        names=["feature", "numbers", "noise", "bits at most", "rate", "rate at most", "its task takes"],
        rows=[
            [
                f.task,
                str(f.channel.dimensions),
                f"{f.channel.noise:.3g}",
                f"{f.channel.bits_per_image:.2f}",
                f"{f.rate.bits:.2f}",
                f"{f.rate.high:.2f}",
                NOT_MEASURED if f.task_bits is None else f"{f.task_bits:.2f}",
            ]
            for f in features
        ],
        words=frozenset({"feature"}),
        note="Bits of one image. bits at most: the capacity of the channel, for any image and any attacker. rate: "
        "measured on test rows, for images like these; at most: the upper end of its 95 % interval. its task takes: "
        "what the accuracy of the task's own head proves to be used. Releases of different images of a person add up, "
        "and so do those of several tasks.",
    )
