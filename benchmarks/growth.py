"""Time per step and memory for 1, 2, 4, 8 and 16 tasks, with and without the dissimilarity term.

ResNet-18, k = 6, 64x64 images, batch 64, frozen encoder from the cache, all in one process. The term has one value a
pair, so it grows with the square of the tasks; the per-task moments are shared between pairs. The ratio is the share of
the step that the term takes at 16 tasks: it must not dominate. Plain pairwise `pytorch_msssim` is timed beside it.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

from _harness import BATCH, arguments, finish, paired, session_plan

COUNTS = (1, 2, 4, 8, 16)


def main() -> int:
    options = arguments(__doc__ or "")
    import psutil
    import torch

    from orchestrator.local import LocalConsumer, LocalProducer
    from orchestrator.session import Session

    torch.set_num_threads(os.cpu_count() or 1)
    rows, share = [], 1.0
    for n in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            sessions = []
            for omega in (1e-3, 0.0):
                plan = session_plan(n, Path(folder), omega=omega)
                producer = LocalProducer(plan)
                offers = producer.offers()
                consumers = [LocalConsumer(offers[t], plan.consumer_config(t)) for t in plan.data.specs]
                made = Session(producer, consumers, steps_per_epoch=plan.steps_per_epoch, epochs=1)
                made.enrol()
                sessions.append(made)
            with_term, without = paired(*[s.train_step for s in sessions], rounds=max(2, options.rounds // 2))
        shape = sessions[0].producer.offers()["task0"].contract.shape
        plain = pairwise_library(n, shape) if n > 1 else 0.0
        term = max(0.0, min(with_term) - min(without))
        share = term / min(with_term)
        memory = psutil.Process().memory_info().rss / 2**20
        rows.append(
            {
                "tasks": n,
                "step_s": min(with_term),
                "term_s": term,
                "share": share,
                "library_s": plain,
                "rss_mib": memory,
            }
        )
        print(
            f"{n:>2} tasks: {min(with_term):6.2f} s a step, of it {term:6.3f} s dissimilarity ({share:4.0%}; "
            f"pairwise library {plain:6.3f} s), {memory:5.0f} MiB"
        )
    return 0 if finish("growth", share, 0.5, figures={"rows": rows}, to=options.json) else 1


def pairwise_library(n: int, shape: tuple[int, ...]) -> float:
    """Forward and backward of `pytorch_msssim.ssim` over every pair."""
    import torch
    from _harness import seconds
    from pytorch_msssim import ssim

    features = [torch.rand(BATCH, *shape, requires_grad=True) for _ in range(n)]

    def work() -> None:
        total = torch.zeros(())
        for i in range(n):
            for j in range(i):
                total = total + ssim(features[i], features[j], data_range=1.0, win_size=7)
        total.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return seconds(work)


if __name__ == "__main__":
    raise SystemExit(main())
