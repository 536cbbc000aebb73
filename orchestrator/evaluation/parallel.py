"""Attacks are independent of one another: on a cluster they run side by side, a core each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from orchestrator.memory import keep_freed_memory


class AnsweringJob(Protocol):
    """A job that knows what to answer with when the process that ran it died."""

    def lost(self, reason: str) -> Any:
        """A result of the job's kind that is marked as crashed."""
        ...


Job = TypeVar("Job", bound=AnsweringJob)
Result = TypeVar("Result")


def on_ray(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """`map`, as Ray remote functions, a core each. Results come in the order of the jobs.

    What the work holds (the features) is put into the object store once and shared by all jobs. A job whose process
    dies is a crashed attack: it says nothing about privacy.
    """
    import ray
    from ray.exceptions import RayError

    shared = ray.put(work)
    run: Any = ray.remote(_run).options(num_cpus=1, scheduling_strategy="SPREAD")
    references = [run.remote(shared, job) for job in jobs]
    for job, reference in zip(jobs, references, strict=True):
        try:
            result: Result = ray.get(reference)
        except RayError as error:
            result = job.lost(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        yield result


def _run(work: Callable[[Job], Result], job: Job) -> Result:
    import torch

    keep_freed_memory()
    torch.set_num_threads(1)
    return work(job)
