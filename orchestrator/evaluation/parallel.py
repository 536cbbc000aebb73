"""Attacks are independent of one another: on a cluster they run side by side, a core each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from orchestrator.cluster import free_cpus
from orchestrator.memory import keep_freed_memory

_PREPARED = 32
"""Workers at most that are started before it is known how many jobs there are."""


class AnsweringJob(Protocol):
    """A job that knows what to answer with when the process that ran it died."""

    def lost(self, reason: str) -> Any:
        """A result of the job's kind that is marked as crashed."""
        ...


Job = TypeVar("Job", bound=AnsweringJob)
Result = TypeVar("Result")


def prepare() -> None:
    """Let free workers import now what attackers need, while the caller still collects what they are to work on.

    A worker that meets PyTorch with its first job spends seconds on that. Returns at once, and nothing waits for them.
    """
    for _ in range(min(_PREPARED, int(free_cpus()))):
        _on_a_core(_import_attackers).remote()


def on_ray(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """`map`, as Ray remote functions, a core each. Results come in the order of the jobs.

    What the work holds (features, and the weights of heads) is put into the object store once, and read once by each
    worker. A job whose process dies is a crashed attack: it says nothing about privacy.
    """
    import ray
    from ray.exceptions import RayError

    shared, run = ray.put(work), _on_a_core(_run)
    references = [run.remote([shared], job) for job in jobs]
    for job, reference in zip(jobs, references, strict=True):
        try:
            result: Result = ray.get(reference)
        except RayError as error:
            result = job.lost(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        yield result


def _on_a_core(function: Callable[..., Any]) -> Any:
    import ray

    return ray.remote(function).options(num_cpus=1, scheduling_strategy="SPREAD")


def _import_attackers() -> None:
    import orchestrator.evaluation.budget
    import orchestrator.evaluation.reconstruction.budget  # noqa: F401 - to have them imported is all


def _run(shared: Sequence[Any], job: Job) -> Any:
    """``shared`` holds the reference to the work: Ray would read what stands there by itself anew for every job."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(1)
    return _work(*shared)(job)


@lru_cache(maxsize=1)
def _work(reference: Any) -> Callable[[Any], Any]:
    """Of the latest reference alone. Arrays stay in the store, but weights are copied: a quarter of a second a time."""
    import ray

    work: Callable[[Any], Any] = ray.get(reference)
    return work
