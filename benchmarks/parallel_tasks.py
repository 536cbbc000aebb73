"""Three tasks trained together on Ray, against the three one after another in one plain PyTorch process.

ResNet-18, k = 6, 64x64 images, batch 64, frozen encoder, no dissimilarity term, so that both sides compute the same
on the same cached features. The same threads in total: each tenant's process has its share, the plain process has all.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from _harness import PlainTask, arguments, encoder_features, finish, paired, ratio, session_plan

TASKS = 3


def main() -> int:
    options = arguments(__doc__ or "")
    import torch

    from orchestrator.actors import RayConsumer, RayProducer
    from orchestrator.cluster import ray_cluster
    from orchestrator.sampling import ShuffledBatches
    from orchestrator.session import Session

    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
        plan = session_plan(TASKS, Path(folder))
        producer = RayProducer(plan)
        offers = producer.offers()
        consumers = [
            RayConsumer(offers[t], plan.consumer_config(t), threads=max(1, cores // TASKS), parties=1 + TASKS)
            for t in plan.data.specs
        ]
        session = Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=1)
        session.enrol()

        u, tasks = encoder_features(plan), [PlainTask(plan, t) for t in plan.data.specs]
        sampler = ShuffledBatches(len(u), batch_size=64, seed=0)
        steps = iter(range(10**9))

        def one_after_another() -> None:
            ids = sampler.ids(next(steps))
            for task in tasks:
                task.step(u[ids], ids)

        ours, theirs = paired(session.train_step, one_after_another, rounds=options.rounds, repeat=4)
    value = ratio(ours, theirs)
    print(f"together {1000 * min(ours):.0f} ms a step of three tasks, one after another {1000 * min(theirs):.0f} ms")
    figures = {"ray_s": ours, "plain_s": theirs, "cores": cores}
    return 0 if finish("parallel_tasks", value, 0.75, figures=figures, to=options.json) else 1


if __name__ == "__main__":
    raise SystemExit(main())
