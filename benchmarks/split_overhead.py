"""One session step on Ray, one task, against the same mathematics in one plain PyTorch process.

ResNet-18, k = 6, 64x64 images, batch 64, frozen encoder from the feature cache: the default path, and the one with the
least arithmetic to hide the protocol behind. Both sides use all cores.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from _harness import PlainTask, arguments, encoder_features, finish, paired, ratio, session_plan


def main() -> int:
    options = arguments(__doc__ or "")
    import torch

    from orchestrator.actors import RayConsumer, RayProducer
    from orchestrator.cluster import ray_cluster
    from orchestrator.sampling import ShuffledBatches
    from orchestrator.session import Session

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
        plan = session_plan(1, Path(folder))
        producer = RayProducer(plan)
        consumer = RayConsumer(
            producer.offers()["task0"], plan.consumer_config("task0"), threads=os.cpu_count(), parties=2
        )
        session = Session(producer, [consumer], steps_per_epoch=plan.steps_per_epoch, epochs=1)
        session.enrol()

        u, task = encoder_features(plan), PlainTask(plan, "task0")
        sampler = ShuffledBatches(len(u), batch_size=64, seed=0)
        steps = iter(range(10**9))

        def plain() -> None:
            ids = sampler.ids(next(steps))
            task.step(u[ids], ids)

        ours, theirs = paired(session.train_step, plain, rounds=options.rounds, repeat=5)
    value = ratio(ours, theirs)
    print(f"on Ray {1000 * min(ours):.0f} ms a step, plain {1000 * min(theirs):.0f} ms")
    figures = {"ray_s": ours, "plain_s": theirs}
    return 0 if finish("split_overhead", value, 1.05, figures=figures, to=options.json) else 1


if __name__ == "__main__":
    raise SystemExit(main())
