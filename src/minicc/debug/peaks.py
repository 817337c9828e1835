"""What this machine can do at most: fused multiply-adds and copies per second, measured.

The roofs of a roofline picture. Host CPU only; nothing of minicc's own kernels takes part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from minicc.runtime.probes import CHAINS, compile_probes

ROUNDS = 2_000_000
COPIED = 1 << 26  # bytes per thread, far beyond a core's share of the caches
REPEATS = 5


@dataclass(frozen=True)
class Peaks:
    """Peaks of some threads together: 1e9 f32 operations (a fused multiply-add is two), 1e9 bytes read and written."""

    threads: int
    gflops: float
    gbytes: float

    def bound(self, flops: float, size: float) -> float:
        """The least seconds for this many operations and bytes to and from memory."""
        return max(flops / self.gflops, size / self.gbytes) * 1e-9


def measure_peaks(threads: int = 1) -> Peaks:
    """Measure for a second or so; best of some repeats."""
    probes = compile_probes()
    results = [np.ones(probes.lanes * CHAINS, np.float32) for _ in range(threads)]
    sources = [np.ones(COPIED // 8, np.float32) for _ in range(threads)]
    copies = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(threads) as pool:
        adding = _best(pool, threads, lambda i: probes.multiply(results[i].ctypes.data, ROUNDS))
        copying = _best(pool, threads, lambda i: np.copyto(copies[i], sources[i]))
    flops = 2 * probes.lanes * CHAINS * ROUNDS * threads
    return Peaks(threads, flops / adding * 1e-9, COPIED * threads / copying * 1e-9)


def _best(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
        best = min(best, time.perf_counter() - start)
    return best
