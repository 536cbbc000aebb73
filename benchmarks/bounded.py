"""A bounded feature against the paper's k = 5 map: what is sent, what the tenant's head holds, and the time of a step.

ResNet-18, 64x64 images, batch 64, one task, frozen encoder from the feature cache, both parties in one process: what a
step computes, without what carries it. A bounded module does more than Cross-SEC alone, so the producer takes longer,
and the head next to nothing. The ratio that counts is that of a whole step.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _harness import BATCH, IMAGE_SIZE, arguments, finish, ratio, seconds, session_plan

SPLIT = 5
BITS = 9.3
PARTIES = ("producer", "consumer")


def plans(folder: Path) -> dict[str, Any]:
    """The same session with either kind of feature."""
    from orchestrator.network import BoundedNetworkConfig
    from orchestrator.privacy.bounded.channel import ChannelConfig
    from orchestrator.privacy.bounded.keyed_noise import NoiseKey
    from orchestrator.release import NoisePlan

    plan, key = session_plan(1, folder, split_index=SPLIT), folder / "noise.key"
    NoiseKey.generate().save(key)
    bounded = BoundedNetworkConfig.of(plan.network, ChannelConfig.for_bits(BITS))
    noise = NoisePlan(key=key, run="benchmark")
    return {"map": plan, "bounded": dataclasses.replace(plan, network=bounded, noise=noise)}


class Parties:
    """One producer and one consumer, which take a step in turns."""

    def __init__(self, plan: Any) -> None:
        from orchestrator.assembly import build_producer
        from orchestrator.consumer import Consumer

        self.producer, self.task, self.next = build_producer(plan), "task0", 0
        self.consumer = Consumer(self.producer.offers()[self.task], plan.consumer_config(self.task))
        self.consumer.receive_labels(self.producer.seal_labels(self.consumer.public_key(), "train"))

    def step(self) -> dict[str, float]:
        """Seconds of each party."""
        out: dict[str, Any] = {}

        def sends() -> None:
            out["batch"] = self.producer.features(self.next)[self.task]

        def answers() -> None:
            out["gradient"] = self.consumer.learn(out["batch"])

        def learns() -> None:
            self.producer.learn(self.next, {self.task: out["gradient"]})

        work: Mapping[str, Callable[[], None]] = {"sends": sends, "answers": answers, "learns": learns}
        took = {name: seconds(part) for name, part in work.items()}
        self.next += 1
        return {"producer": took["sends"] + took["learns"], "consumer": took["answers"]}

    def sizes(self) -> dict[str, int]:
        """Bytes of a feature as it is sent, and numbers and bytes of the head."""
        batch, head = self.producer.features(self.next)[self.task], self.consumer.head()
        weights = list(head.state.values())
        return {
            "bytes per feature": batch.features.nbytes // len(batch.features),
            "head, weights": sum(value.size for value in weights),
            "head, bytes": sum(value.nbytes for value in weights),
        }


def measured(parties: Mapping[str, Parties], *, rounds: int, repeat: int = 3) -> dict[str, dict[str, list[float]]]:
    """Kind of feature to party to seconds of a step in each round, both kinds in turns, the first round not counted."""
    times: dict[str, dict[str, list[float]]] = {kind: {party: [] for party in PARTIES} for kind in parties}
    for done in range(rounds + 1):
        for kind, both in parties.items():
            steps = [both.step() for _ in range(repeat)]
            for party in PARTIES if done else ():
                times[kind][party].append(statistics.fmean(step[party] for step in steps))
    return times


def main() -> int:
    options = arguments(__doc__ or "")
    import torch

    torch.set_num_threads(1)  # a small head gains nothing from more, and a ratio of one core holds on any machine
    with tempfile.TemporaryDirectory() as folder:
        parties = {kind: Parties(dataclasses.replace(plan, threads=1)) for kind, plan in plans(Path(folder)).items()}
        sizes = {kind: both.sizes() for kind, both in parties.items()}
        times = measured(parties, rounds=options.rounds)
    ratios = {party: ratio(times["bounded"][party], times["map"][party]) for party in PARTIES}
    steps = {kind: [a + b for a, b in zip(by["producer"], by["consumer"], strict=True)] for kind, by in times.items()}
    ratios["both"] = ratio(steps["bounded"], steps["map"])
    print(f"k = {SPLIT}, {IMAGE_SIZE}x{IMAGE_SIZE}, batch {BATCH}; bounded: {BITS} bits")
    print(f"{'':>20}{'map':>14}{'bounded':>14}{'bounded / map':>16}")
    for name, value in sizes["map"].items():
        print(f"{name:>20}{value:>14,}{sizes['bounded'][name]:>14,}{sizes['bounded'][name] / value:>16.5f}")
    for party in (*PARTIES, "both"):
        of = {
            kind: 1000 * statistics.median(steps[kind] if party == "both" else by[party]) for kind, by in times.items()
        }
        name = f"{party} step, ms" if party != "both" else "step, ms"
        print(f"{name:>20}{of['map']:>14.1f}{of['bounded']:>14.1f}{ratios[party]:>16.3f}", flush=True)
    figures = {"sizes": sizes, "seconds": times, "ratios": ratios}
    return 0 if finish("bounded", ratios["both"], 0.25, figures=figures, to=options.json) else 1


if __name__ == "__main__":
    raise SystemExit(main())
