"""Work cut into ranges, run on as many threads as the plan sets. Results don't depend on the ranges.

Compiled loops release the GIL, so Python threads use all cores; Numba's own don't survive the fork of a Celery worker.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import torch

SMALL = 1 << 22  # values; with fewer, PyTorch's threads, which spin after each of its operations, slow the loop down
PARTS_PER_THREAD = 4  # so that threads don't wait for one slow part


def run_ranges(run: Callable[[int, int], None], n: int, parts_per_thread: int = PARTS_PER_THREAD) -> None:
    """Call `run(first, last)` for ranges that cover 0 to n; calls must write to separate memory.

    The calling thread takes part: if it slept, the system might run two of the others on one core.
    """
    n_threads = torch.get_num_threads()
    n_parts = min(n, n_threads * parts_per_thread) if n_threads > 1 else 1
    parts = deque(pairwise(n * part // n_parts for part in range(n_parts + 1))) if n else deque()

    def work() -> None:
        while parts:
            try:
                part = parts.popleft()
            except IndexError:  # another thread has taken the last part
                return
            run(*part)

    others = [_pool(n_threads).submit(work) for _ in range(min(n_threads, n_parts) - 1)]
    try:
        work()
    finally:
        parts.clear()  # after an error or Ctrl-C no thread begins another part
        wait(others)
    for other in others:
        other.result()


def over_rows(loop: Callable[..., None], n_rows: int, size: int, *args: Any) -> None:
    """Run `loop(first, last, *args)` on all rows; `size` is the number of values that it processes."""
    if size < SMALL:
        loop(0, n_rows, *args)
    else:
        run_ranges(lambda first, last: loop(first, last, *args), n_rows)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernels")
