"""How fast memory can be read: what a decode step, which reads every weight once, is measured against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 256 << 20  # far more than any cache holds
_TRIES = 7


def host_read_bandwidth(n_threads: int) -> float:
    """Bytes a second that `n_threads` threads read from main memory together, the best of some tries."""
    parts = np.array_split(np.ones(_BYTES // 8), n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_TRIES):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _BYTES / (time.perf_counter() - start))
    return best
