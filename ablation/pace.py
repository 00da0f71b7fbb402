"""How fast is this machine, measured against the one that the cost table (`cost.py`) was measured on? Torch-free."""

import time

import numpy as np
from threadpoolctl import threadpool_limits

TABLE_S = 0.0130  # what the products took there


def measure_pace() -> float:
    """One thread of this machine as a multiple of one there.

    By two matrix products, float32 and float64: the best of a few, some hundredths of a second in all.
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
