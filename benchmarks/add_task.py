"""Adding a task with the feature cache, against recomputing the frozen encoder for every batch.

ResNet-18, k = 6, 64x64 images, batch 64. The cache is warm, as it is when a task is added to an encoder that already
serves others; what filling it costs is printed beside. Two heads: the rest of the ResNet, where the head's own
arithmetic dominates, and a linear head, where the encoder's does.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

from _harness import arguments, finish, paired, ratio, seconds, session_plan


def main() -> int:
    options = arguments(__doc__ or "")
    import torch

    from orchestrator.assembly import SessionPlan, build_producer
    from orchestrator.local import LocalConsumer, LocalProducer
    from orchestrator.session import Session

    torch.set_num_threads(os.cpu_count() or 1)

    def session(plan: SessionPlan) -> Session:
        producer = LocalProducer(plan)
        consumer = LocalConsumer(producer.offers()["task0"], plan.consumer_config("task0"))
        made = Session(producer, [consumer], steps_per_epoch=plan.steps_per_epoch, epochs=1)
        made.enrol()
        return made

    met = []
    with tempfile.TemporaryDirectory() as folder:
        fill = seconds(lambda: build_producer(session_plan(1, Path(folder))))
        print(f"filling the cache: {fill:.2f} s for {64 * 2} images, once per encoder")
        for head, target in (("linear", 1 / 4), ("backbone", 1 / 1.3)):
            plan = session_plan(1, Path(folder), head=head)
            cached, recomputed = session(plan), session(dataclasses.replace(plan, use_cache=False))
            ours, theirs = paired(cached.train_step, recomputed.train_step, rounds=options.rounds, repeat=4)
            value = ratio(ours, theirs)
            print(
                f"{head} head: cached {1000 * min(ours):.0f} ms a step, recomputed {1000 * min(theirs):.0f} ms: "
                f"{1 / value:.1f} times faster"
            )
            name = "add_task" if head == "backbone" else "add_task_linear"
            figures = {"cached_s": ours, "recomputed_s": theirs, "fill_s": fill}
            to = options.json if head == "backbone" else None
            met.append(finish(name, value, round(target, 4), figures=figures, to=to))
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
