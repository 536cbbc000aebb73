"""Attacks are independent of one another: on a cluster they run side by side, a core each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.leakage import AttackJob
from orchestrator.memory import keep_freed_memory

Work = Callable[[AttackJob], AttackResult]


def on_ray(work: Work, jobs: Sequence[AttackJob]) -> Iterator[AttackResult]:
    """`map`, as Ray remote functions. Results come in the order of the jobs.

    What the work holds (the features) is put into the object store once and shared by all jobs. A job whose process
    dies is a crashed attack: it says nothing about privacy.
    """
    import ray
    from ray.exceptions import RayError

    shared = ray.put(work)
    run = ray.remote(_run).options(num_cpus=1, scheduling_strategy="SPREAD")
    references = [run.remote(shared, job) for job in jobs]
    for job, reference in zip(jobs, references, strict=True):
        try:
            result: AttackResult = ray.get(reference)
        except RayError as error:
            crashed = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            result = AttackResult(attack=job.attack.name, seed=job.seed, seconds=0.0, crashed=crashed)
        yield result


def _run(work: Work, job: AttackJob) -> AttackResult:
    import torch

    keep_freed_memory()
    torch.set_num_threads(1)
    return work(job)
