"""The speed of this machine, relative to the one that the cost table (`cost.py`) was measured on, and its memory.

In: nothing. Out: a `Machine`. Torch-free.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

TABLE_S = 0.0130  # seconds of the products on that machine

# Linux's files with a container's memory limit; "max", or a number beyond any machine, means no limit.
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Machine:
    """A machine that jobs run on; by default the one that the cost table was measured on, with memory without end.

    `pace`: one of its threads as a multiple of one there. `memory_bytes`: what a job may take.
    """

    pace: float = 1.0
    memory_bytes: float = math.inf


def measure_machine(memory_bytes: int | None = None) -> Machine:
    """This machine; `memory_bytes` is what the operator lets a job take, None: all that there is."""
    return Machine(measure_pace(), memory_bytes or find_memory())


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
