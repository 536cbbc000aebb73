"""Keeping freed memory in the process.

A training step frees and takes again hundreds of megabytes. By default glibc gives them back to the kernel, which must
clear it again before its next use: on small machines that can cost as much as the arithmetic.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc accepts no larger one."""
_TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed. For processes of our own: actors, workers, commands.

    Returns whether it understood; other C libraries than glibc do not, and nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
