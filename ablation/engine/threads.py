"""Work cut into ranges, run on as many threads as the plan gave torch. The ranges don't change any number.

Kernels release Python's lock, so plain threads use all cores; Numba's own don't survive the fork of a Celery worker.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

PARTS_PER_THREAD = 4  # so that one slow part doesn't leave the others waiting


def run_ranges(run: Callable[[int, int], None], n: int) -> None:
    """Call `run(first, last)` for ranges that cover 0 to n, which must write to places of their own."""
    n_threads = torch.get_num_threads()
    n_parts = min(n, n_threads * PARTS_PER_THREAD) if n_threads > 1 else 1
    cuts = [n * part // n_parts for part in range(n_parts + 1)] if n else []
    if n_parts == 1:
        run(0, n)
        return
    for _ in _pool(n_threads).map(run, cuts[:-1], cuts[1:]):
        pass


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernels")
