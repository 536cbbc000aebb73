"""Jobs of attackers on Ray: what each worker reads and imports once, and a worker that dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

import pytest
from waiting import wait_for

from orchestrator.cluster import free_cpus
from orchestrator.evaluation import parallel

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray leaves a socket to its log monitor for the interpreter to close.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@dataclass(frozen=True)
class Numbered:
    number: int

    def lost(self, reason: str) -> str:
        return f"lost: {reason.partition(':')[0]}"


@pytest.fixture(autouse=True)
def _workers_need_not_import_this_file():
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


JOBS = [Numbered(number) for number in range(12)]


def counted_work(folder, factor):
    """Multiplies; and each time that it is read from the store, leaves a file with the reader's process id."""

    def restored(path, times):
        import tempfile

        tempfile.mkstemp(prefix=f"{os.getpid()}-", dir=path)
        return lambda job: (job.number * times, os.getpid())

    class Work:
        def __call__(self, job):
            raise AssertionError("a job runs what was read from the store")

        def __reduce__(self):
            return restored, (str(folder), factor)

    return Work()


def test_each_worker_reads_the_work_once_and_the_next_work_anew(tmp_path):
    for factor in (2, 3):
        folder = tmp_path / str(factor)
        folder.mkdir()
        found = list(parallel.on_ray(counted_work(folder, factor), JOBS))
        assert [value for value, _ in found] == [factor * job.number for job in JOBS]
        readers = [path.name.split("-")[0] for path in folder.iterdir()]
        assert sorted(readers) == sorted({str(pid) for _, pid in found})


def test_preparing_lets_each_free_worker_import_what_attackers_need(tmp_path, monkeypatch):
    wait_for(lambda: free_cpus() == 2, 120)  # earlier tests' workers are back
    asked = parallel._import_attackers

    def and_say_so():
        asked()
        missing = {"orchestrator.evaluation.attacks.mlp", "torchvision"} - sys.modules.keys()
        (tmp_path / str(os.getpid())).write_text(str(missing or "everything"))
        time.sleep(2)

    monkeypatch.setattr(parallel, "_import_attackers", and_say_so)
    parallel.prepare()
    wait_for(lambda: [path.read_text() for path in tmp_path.iterdir()] == ["everything"] * 2, 120)


def test_a_job_whose_worker_dies_is_lost_and_the_others_come_through():
    def work(job):
        if job.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return job.number

    found = list(parallel.on_ray(work, JOBS))
    assert found == [0, 1, 2, "lost: WorkerCrashedError", *range(4, 12)]
