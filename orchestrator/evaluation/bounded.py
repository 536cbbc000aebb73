"""What is known of bounded features beside what attackers find: their capacity, and the rate that was measured.

Axes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.evaluation.attacks.base import LabelArray
from orchestrator.evaluation.collect import Published
from orchestrator.evaluation.leakage import own_accuracy
from orchestrator.evaluation.row_bounds import least_task_bits
from orchestrator.privacy.bounded.bounds import capacity_bound, local_dp_epsilon
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.bounded.rate import RateBound
from orchestrator.privacy.guarantee import LOCAL_DELTA
from orchestrator.report.sheet import NOT_MEASURED, Sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundedFeature:
    """One task's."""

    task: str
    channel: ChannelConfig
    rate: RateBound
    """Of the test rows; see `row_bounds.measured_rate`."""
    task_bits: float | None
    """At least so many, by the accuracy of the task's own head, with 97.5 % confidence; None where there is no head."""

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
        if given.channel is not None and given.rate is not None and not given.private:
            own = own_accuracy(given, published.labels)
            y = published.labels[task]["test"] if task in published.labels else None
            found.append(bounded_feature(task, given.channel, given.rate, y, own=own))
    return tuple(found)


def bounded_feature(
    task: str, channel: ChannelConfig, rate: RateBound, test_y: LabelArray | None, *, own: float | None
) -> BoundedFeature:
    """``own`` is the accuracy of the task's head on the test rows, whose own labels are ``test_y`` (N,).

    None for both where the task answers with a map.
    """
    task_bits = None if own is None or test_y is None else least_task_bits(own, test_y)
    return BoundedFeature(task=task, channel=channel, rate=rate, task_bits=task_bits)


def bounded_sheet(features: Sequence[BoundedFeature]) -> Sheet:
    """One row a feature."""
    return Sheet(
        title="What bounded features carry",
        names=["feature", "cells", "numbers", "noise", "bits at most", "rate", "rate at most", "its task takes"],
        rows=[
            [
                f.task,
                str(f.channel.cells),
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
        note="Bits of one image, all cells together; numbers: of a cell. bits at most: the capacity of the channel, "
        "for any image and any attacker. rate: measured on test rows, for images like these; at most: the upper end of "
        "its 95 % interval. its task takes, at least: what the lower end of the accuracy of the task's own head proves "
        "to be used. Releases of different images of a person add up, and so do those of several tasks.",
    )
