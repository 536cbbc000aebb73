"""Freed memory stays in the process, where the C library is glibc."""

import platform
import subprocess
import sys

import pytest
from tiny import ROOT

FAULTS = """
import resource, sys
import numpy as np
from orchestrator.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(10):
        [np.ones(2**20) for _ in range(8)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_freed_block_is_used_again_without_asking_the_kernel():
    assert faults("keep") * 10 < faults("default")
