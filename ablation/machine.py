"""The speed of this machine, relative to the one that the cost table (`cost.py`) was measured on, and its memory.

In: nothing. Out: its pace, and its memory in bytes. Torch-free.
"""

import os
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

TABLE_S = 0.0130  # seconds of the products on that machine

# Linux's files with a container's memory limit; "max", or a number beyond any machine, means no limit.
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def measure_pace() -> float:
    """Speed of one thread, as a multiple of one thread of that machine.

    Measured by two matrix products, float32 and float64, as the best of a few; takes some hundredths of a second.
    """
    with threadpool_limits(1):
        best_s = sum(_best_product_s(size, dtype) for size, dtype in ((768, np.float32), (512, np.float64)))
    return TABLE_S / best_s


def _best_product_s(size: int, dtype: type) -> float:
    matrix: np.ndarray = np.random.default_rng(0).random((size, size)).astype(dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def find_memory() -> int:
    """Bytes of memory that a process may take: all of the machine's, or its container's limit."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in MEMORY_LIMITS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return min(found)
